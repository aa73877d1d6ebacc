"""Adds to a comparison what runs recorded: metrics, curves, environments, and what it costs to run a stage again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np

from speculators.diff.acceptance import acceptance_changes
from speculators.diff.compare import compare
from speculators.diff.comparison import REUSED, Comparison, Curves, RunDifferences, StageChange
from speculators.diff.consequence import VOCABULARY
from speculators.diff.side import Conditions, DiffSide
from speculators.errors import ArtifactError
from speculators.files.disk import read_json
from speculators.runs.benches import RunBenchmarks, read_benches
from speculators.runs.log import RunLog
from speculators.runs.places import Places, RunFolder
from speculators.runs.records import RunRecord, environment_of, flat, record, records


def compare_with_records(a: DiffSide, b: DiffSide, runs: Path) -> Comparison:
    """Compares two sides, with what the runs among them recorded and what the stages to run again cost.

    Args:
        runs: folder of more runs, whose times and tokens count where they did the same work.

    Raises:
        ArtifactError: a run is damaged.
    """
    benches = {side.name: read_benches(side.run) for side in (a, b) if side.run}
    a, b = (_with_conditions(side, benches[side.name]) if side.run else side for side in (a, b))
    own = {side.name: recorded for side in (a, b) if side.run and (recorded := record(RunFolder(side.run)))}
    result = compare(a, b)
    return attrs.evolve(
        result,
        changes=tuple(
            attrs.evolve(change, consequence=change.consequence + _coverage(a, b, own))
            if change.path == VOCABULARY
            else change
            for change in result.changes
        ),
        stages=tuple(_with_costs(result.stages, a, b, own, runs)),
        notes=(*result.notes, *(f"{name}: {line}" for name, bench in benches.items() for line in bench.unread)),
        runs=RunDifferences(
            metrics=tuple(acceptance_changes(benches[a.name].settings, benches[b.name].settings)),
            curves=(curves(a.run), curves(b.run)),
            environment=environment(a.run, b.run),
        )
        if a.run and b.run
        else None,
    )


def _with_conditions(side: DiffSide, benches: RunBenchmarks) -> DiffSide:
    conditions = {each.setting.key: Conditions(each.setting.definition, each.result.dtype) for each in benches.filed}
    return attrs.evolve(side, conditions=conditions)


def _with_costs(
    stages: Sequence[StageChange], a: DiffSide, b: DiffSide, own: Mapping[str, RunRecord], runs: Path
) -> Iterable[StageChange]:
    """Adds to each stage that runs again what it cost where B's own work was done, else what it cost A."""
    others: list[RunRecord] | None = None
    for row in stages:
        if row.status == REUSED or row.stage not in b.stages:
            yield row
            continue
        did = _did(b, row.stage, own.values())
        if did is None:
            others = records(runs) if others is None else others
            did = _did(b, row.stage, others)
        if did is not None:
            yield attrs.evolve(row, cost=_cost(did, row.stage))
        elif a.name in own and row.stage in own[a.name].seconds:
            yield attrs.evolve(row, cost=f"before: {_cost(own[a.name], row.stage)}")
        else:
            yield row


def _did(side: DiffSide, stage: str, among: Iterable[RunRecord]) -> RunRecord | None:
    """Finds the first record of a run that made a stage of the same fingerprint from start to end."""
    fingerprint = side.stages[stage].fingerprint
    return next((each for each in among if each.fingerprints.get(stage) == fingerprint and stage in each.seconds), None)


def _cost(recorded: RunRecord, stage: str) -> str:
    tokens = f"{recorded.tokens[stage]:,} tokens in " if stage in recorded.tokens else ""
    return f"{tokens}{recorded.seconds[stage]:,.0f} s on {recorded.device} ({recorded.run})"


def _coverage(a: DiffSide, b: DiffSide, own: Mapping[str, RunRecord]) -> str:
    """Says which share of supervised tokens each draft vocabulary has, where the counts are at hand."""
    before, after = (_share(side, own.get(side.name)) for side in (a, b))
    return "" if before is None or after is None else f", target coverage {before:.2%} -> {after:.2%}"


def _share(side: DiffSide, recorded: RunRecord | None) -> float | None:
    if recorded and recorded.coverage is not None:
        return recorded.coverage
    size, prepare = side.values.get(VOCABULARY), side.stages.get("prepare")
    file = Places().conversations(prepare.fingerprint) / "counts.npy" if prepare else None
    if size is None or file is None or not file.is_file():
        return None
    try:
        counts = np.sort(np.load(file))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: damaged: {error}", hint="delete its folder") from error
    return float(counts[-size:].sum() / counts.sum())


def curves(folder: Path) -> Curves:
    """Reads a run's training loss, and its exact acceptance length at each evaluation, in order."""
    log = RunLog.read(RunFolder(folder).events)
    return Curves(
        loss=tuple(update.loss for update in log.updates()),
        tau=tuple(evaluation.tau for evaluation in log.evaluations()),
    )


def environment(a: Path, b: Path) -> dict[str, tuple[str, str]]:
    """Compares where two runs ran: packages, device, threads, processes, platform, code.

    Raises:
        ArtifactError: the environment in a lock is not a table.
    """
    one, other = (_where(RunFolder(folder).lock) for folder in (a, b))
    keys = [key for key in dict.fromkeys([*one, *other]) if not key.startswith(("fingerprints.", "format"))]
    pairs = {key: (one.get(key, "-"), other.get(key, "-")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _where(file: Path) -> dict[str, str]:
    lock = read_json(file)
    where = environment_of(lock)
    if where is None:
        if not file.is_file():
            return {}
        fault = f"its environment is {lock['environment']!r}" if isinstance(lock, dict) else "it is not a table"
        raise ArtifactError(f"{file}: damaged: {fault}", hint="run its recipe again with spec run to write it anew")
    return flat(where)
