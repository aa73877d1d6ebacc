"""The ledger of a run, from what is in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import jsonable
from speculators.errors import ArtifactError
from speculators.files.disk import read_json
from speculators.recipe.plan import read_plan
from speculators.runs.benches import read_benches, read_served
from speculators.runs.ledger import LedgerLine, TrainedTau, ledger
from speculators.runs.log import read_events
from speculators.runs.stages import SPECULATOR, TAU_AT, TRAINED


def ledger_of(run: Path) -> dict[str, Any]:
    """Returns the ledger as JSON values: `lines`, `alarms` in words, what was `unread`, and whether all `agrees`.

    Raises:
        ArtifactError: the folder is no run, or nothing is measured in it.
    """
    if not (run / "plan.json").is_file():
        raise ArtifactError(f"{run}: no run: it has no plan.json", hint="spec ls lists the runs")
    plan, benches = read_plan(run), read_benches(run)
    endpoints, unread = read_served(run)
    measured = [
        {**file, "settings": [setting for setting in benches.settings if setting["file"] == file["file"]]}
        for file in benches.files
    ]
    lines = ledger(measured, endpoints, _trained(run, plan))
    if not lines:
        raise ArtifactError(f"{run}: nothing is measured", hint="spec run of its recipe does, if it names a suite")
    alarms = [words for line in lines for words in line.alarms]
    told: dict[str, Any] = jsonable({"lines": [_line(line) for line in lines]})
    doctor = f"spec doctor {run / SPECULATOR}"
    return {
        "run": run.name,
        **told,
        "alarms": alarms,
        "doctor": doctor,
        "unread": [*benches.unread, *unread],
        "agrees": not alarms,
    }


def _line(line: LedgerLine) -> dict[str, Any]:
    return attrs.asdict(line)


def _trained(run: Path, plan: dict[str, Any]) -> list[TrainedTau]:
    """Returns what training measured of the checkpoint that it chose: first suite and temperature.

    That is the number by which it was chosen, at the largest K, and of those that the same pass gave, the recipe's K.
    """
    note, section = read_json(run / TRAINED), plan["recipe"]["benchmark"]
    if not isinstance(note, dict) or note.get("tau") is None or not section["suites"]:
        return []
    taus = {max(section["num_speculative_tokens"]): note["tau"]}
    for event in read_events(run / "events.jsonl"):
        if event.get("event") == "EvalEvent" and event["step"] == note["step"]:
            smaller = {name: tau for name, tau in event["metrics"].items() if name.startswith(TAU_AT)}
            taus |= {int(name.removeprefix(TAU_AT)): tau for name, tau in smaller.items()}
    return [
        TrainedTau(
            suite=section["suites"][0]["name"],
            num_speculative_tokens=k,
            temperature=section["temperature"][0],
            tau=tau,
            step=note["step"],
        )
        for k, tau in sorted(taus.items())
        if k in section["num_speculative_tokens"]
    ]
