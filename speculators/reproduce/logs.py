"""Compares training by two logs: every loss, gradient norm, metric and evaluation, in full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.events import EvalEvent, StepEvent
from speculators.reproduce.findings import DIFFERS, SAME, Finding, Gap, finding, first, gap, unknown, worst
from speculators.runs.log import RunLog
from speculators.runs.places import RunFolder

# Fields of an event that measure the clock and not the training.
_TIMES = ("tokens_per_second", "seconds_left")

# The values of one update, by name.
Values = dict[str, Any]
# By update, its records in the order of the log: a resumed run repeats what came after its checkpoint.
Records = Mapping[int, list[Values]]


def _records_of(events: Sequence[StepEvent] | Sequence[EvalEvent]) -> Records:
    """Groups the values of events by the number of their update."""
    records: dict[int, list[Values]] = {}
    for event in events:
        records.setdefault(event.step, []).append(_values(event))
    return records


def _values(event: StepEvent | EvalEvent) -> Values:
    """Takes the values out of an event, metrics by their own names; the loss comes first, to be reported first."""
    values = {key: value for key, value in attrs.asdict(event).items() if key not in (*_TIMES, "step", "metrics")}
    loss = {"loss": values["loss"]} if "loss" in values else {}
    return {**loss, **values, **event.metrics}


def gaps_of(recorded: Mapping[str, Any], again: Mapping[str, Any], tolerance: float | None) -> list[Gap]:
    """Compares two records value by value."""
    names = dict.fromkeys([*again, *recorded])
    return [each for name in names if (each := gap(name, recorded.get(name), again.get(name), tolerance)) is not None]


def compare_logs(run: Path, again: Path, *, tolerance: float | None, whole: bool) -> list[Finding]:
    """Compares the logs of a run and of its re-run.

    Args:
        whole: the run finished its training, so that a missing update is a difference.
    """
    findings = []
    one, other = (RunLog.read(RunFolder(folder).events) for folder in (run, again))
    pairs: dict[str, tuple[Records, Records]] = {
        "update": (_records_of(one.of(StepEvent)), _records_of(other.of(StepEvent))),
        "evaluation": (_records_of(one.of(EvalEvent)), _records_of(other.of(EvalEvent))),
    }
    for noun, (recorded, repeated) in pairs.items():
        if not recorded and not repeated:
            continue
        findings.append(_compare(noun, recorded, repeated, tolerance, whole=whole))
        if twice := _repeats(noun, recorded, tolerance):
            findings.append(twice)
    return findings or [unknown("train", "updates", "the run logged no update")]


def _compare(noun: str, recorded: Records, again: Records, tolerance: float | None, *, whole: bool) -> Finding:
    check = f"{noun}s"
    differing: dict[int, list[Gap]] = {}
    for step in sorted(recorded.keys() & again.keys()):
        # The last record of an update counts: a resumed run went on from that one.
        if gaps := gaps_of(recorded[step][-1], again[step][-1], tolerance):
            differing[step] = gaps
    result = worst([each for gaps in differing.values() for each in gaps])
    lacking = sorted(recorded.keys() ^ again.keys())
    bad = [step for step, gaps in differing.items() if worst(gaps) == DIFFERS]
    if lacking and (whole or set(lacking) & recorded.keys()) and not (bad and bad[0] < lacking[0]):
        side = "the run" if lacking[0] in again else "the re-run"
        evidence = f"{noun} {lacking[0]} is not in the log of {side}"
        return Finding(stage="train", check=check, result=DIFFERS, evidence=evidence, step=lacking[0], what=noun)
    both = len(recorded.keys() & again.keys())
    if not both:
        return unknown("train", check, f"the run logged no {noun}")
    same = f"{both} {noun}s: every loss, norm and metric" if noun == "update" else f"{both} {noun}s: tau and rates"
    if lacking:
        same += f"; the run was not finished, {len(lacking)} more were not compared"
    if not differing:
        return Finding(stage="train", check=check, result=SAME, evidence=same)
    step = next(iter(bad or differing))
    evidence = f"{noun} {step}: {first(differing[step])}; {len(differing)} of {both} {noun}s differ"
    return attrs.evolve(finding("train", check, differing[step], same="", step=step), result=result, evidence=evidence)


def _repeats(noun: str, recorded: Records, tolerance: float | None) -> Finding | None:
    """Compares the updates that a resumed run made twice; None where there are none."""
    twice = {step: records for step, records in recorded.items() if len(records) > 1}
    for step, records in sorted(twice.items()):
        for earlier in records[:-1]:
            if gaps := gaps_of(earlier, records[-1], tolerance):
                repeated = finding("train", f"repeated {noun}s", gaps, same="", step=step)
                values = f"{repeated.what} {repeated.recorded!r}, then {repeated.again!r}"
                return attrs.evolve(repeated, evidence=f"{noun} {step} ran twice: {values}")
    if not twice:
        return None
    evidence = f"{len(twice)} {noun}s ran again after an interruption, with the same values"
    return Finding(stage="train", check=f"repeated {noun}s", result=SAME, evidence=evidence)
