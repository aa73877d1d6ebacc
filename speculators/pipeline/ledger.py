"""The ledger of a run, from what is in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from speculators.bench import result, served
from speculators.bench.ledger import Line, Trained, ledger
from speculators.bench.result import jsonable
from speculators.errors import ArtifactError
from speculators.pipeline.context import read_json
from speculators.pipeline.ondisk import SPECULATOR, TAU_AT, TRAINED, served_folder
from speculators.pipeline.records import read_events


def ledger_of(run: Path) -> dict[str, Any]:
    """Returns the ledger as JSON values: `lines`, `alarms` in words, what was `unread`, and whether all `agrees`.

    Raises:
        ArtifactError: the folder is no run, or nothing is measured in it.
    """
    plan = read_json(run / "plan.json")
    if not isinstance(plan, dict):
        raise ArtifactError(f"{run}: no run: it has no plan.json that can be read", hint="spec ls lists the runs")
    unread: list[str] = []
    benches = _results(run / "bench", result.FORMAT, unread)
    endpoints = _results(served_folder(run), served.FORMAT, unread)
    lines = ledger(benches, endpoints, _trained(run, plan))
    if not lines:
        raise ArtifactError(f"{run}: nothing is measured", hint="spec run of its recipe does, if it names a suite")
    alarms = [words for line in lines for words in line.alarms]
    told: dict[str, Any] = jsonable({"lines": [_line(line) for line in lines]})
    doctor = f"spec doctor {run / SPECULATOR}"
    return {"run": run.name, **told, "alarms": alarms, "doctor": doctor, "unread": unread, "agrees": not alarms}


def _line(line: Line) -> dict[str, Any]:
    return attrs.asdict(line)


def _results(folder: Path, kept: int, unread: list[str]) -> list[dict[str, Any]]:
    """Returns the results in a folder, oldest first; `unread` gets what another version wrote, or nobody can read."""
    found = []
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.stat().st_mtime, file.name)):
        held = read_json(file)
        if isinstance(held, dict) and held.get("format") == kept:
            found.append(held)
        else:
            told = held.get("format") if isinstance(held, dict) else None
            why = f"of format {told}, this version reads {kept}" if told else "damaged"
            unread.append(f"{file} is left out: {why}")
    return found


def _trained(run: Path, plan: dict[str, Any]) -> list[Trained]:
    """Returns what training measured of the checkpoint that it chose: first suite and temperature.

    That is the number by which it was chosen, at the largest K, and those that the same pass gave.
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
        Trained(
            suite=section["suites"][0]["name"],
            num_speculative_tokens=k,
            temperature=section["temperature"][0],
            tau=tau,
            step=note["step"],
        )
        for k, tau in sorted(taus.items())
    ]
