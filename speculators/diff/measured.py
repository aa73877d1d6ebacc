"""Two recipes or runs compared with what runs recorded: metrics, curves, environments, and what re-running costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from speculators.diff.acceptance import differences
from speculators.diff.changes import REUSED, as_values
from speculators.diff.side import Side
from speculators.errors import ArtifactError
from speculators.files.disk import cache_folder, read_json
from speculators.runs.benches import RunBenchmarks, read_benches
from speculators.runs.log import read_events
from speculators.runs.records import Record, flat, record, records, where_of

_VOCABULARY = "algorithm.draft_vocab_size"


def with_records(a: Side, b: Side, runs: Path) -> dict[str, Any]:
    """Returns the comparison with what the runs among both sides recorded, and what the stages to run again cost.

    Args:
        runs: folder of more runs, whose times and tokens count where they did the same work.

    Raises:
        ArtifactError: a run is damaged.
    """
    benches = {side.name: read_benches(side.run) for side in (a, b) if side.run}
    a, b = (_measured(side, benches[side.name]) if side.run else side for side in (a, b))
    result = as_values(a, b)
    result["notes"] += [f"{name}: {words}" for name, held in benches.items() for words in held.unread]
    known = {side.name: found for side in (a, b) if side.run and (found := record(side.run))}
    _add_costs(result["stages"], a, b, known, runs)
    for change in result["changes"]:
        if change["path"] == _VOCABULARY:
            change["consequence"] += _coverage(a, b, known)
    if a.run and b.run:
        result["metrics"] = differences(benches[a.name].settings, benches[b.name].settings)
        result["curves"] = {"a": curves(a.run), "b": curves(b.run)}
        result["environment"] = environment(a.run, b.run)
    return result


def _measured(side: Side, benches: RunBenchmarks) -> Side:
    keys = ("suite", "num_speculative_tokens", "temperature")
    return attrs.evolve(side, measured={tuple(setting[key] for key in keys): setting for setting in benches.settings})


def _add_costs(stages: Sequence[dict[str, Any]], a: Side, b: Side, known: Mapping[str, Record], runs: Path) -> None:
    """Adds to each stage that runs again what it cost where B's own work was done, else what it cost A."""
    others: list[Record] | None = None
    for row in (row for row in stages if row["status"] != REUSED and row["stage"] in b.stages):
        name = row["stage"]
        held = _did(b, name, known.values())
        if held is None:
            others = records(runs) if others is None else others
            held = _did(b, name, others)
        if held is not None:
            row["cost"] = _cost(held, name)
        elif a.name in known and name in known[a.name].seconds:
            row["cost"] = f"before: {_cost(known[a.name], name)}"


def _did(side: Side, stage: str, among: Iterable[Record]) -> Record | None:
    """Returns the first record of a run that made a stage of the same fingerprint from start to end."""
    fingerprint = side.stages[stage]["fingerprint"]
    return next((held for held in among if held.fingerprints.get(stage) == fingerprint and stage in held.seconds), None)


def _cost(held: Record, stage: str) -> str:
    tokens = f"{held.tokens[stage]:,} tokens in " if stage in held.tokens else ""
    return f"{tokens}{held.seconds[stage]:,.0f} s on {held.device} ({held.run})"


def _coverage(a: Side, b: Side, known: Mapping[str, Record]) -> str:
    """Returns the share of supervised tokens that each draft vocabulary has, where the counts are at hand."""
    found = [_share(side, known.get(side.name)) for side in (a, b)]
    return f", target coverage {found[0]:.2%} -> {found[1]:.2%}" if None not in found else ""


def _share(side: Side, held: Record | None) -> float | None:
    if held and held.coverage is not None:
        return held.coverage
    size, prepare = side.values.get(_VOCABULARY), side.stages.get("prepare")
    counted = cache_folder() / "conversations" / prepare["fingerprint"][:16] / "counts.npy" if prepare else None
    if size is None or counted is None or not counted.is_file():
        return None
    try:
        counts = np.sort(np.load(counted))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{counted}: damaged: {error}", hint="delete its folder") from error
    return float(counts[-size:].sum() / counts.sum())


def curves(folder: Path) -> dict[str, list[float]]:
    """Returns a run's training loss, and its exact acceptance length at each evaluation, in order."""
    events = read_events(folder / "events.jsonl")
    kinds = {"loss": "StepEvent", "tau": "EvalEvent"}
    return {name: [value for _, value in points(events, kind, name)] for name, kind in kinds.items()}


def points(events: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    """Returns (update, value) in order; a resumed run has told some updates twice, and the last word counts."""
    held = {event["step"]: event[key] for event in events if event.get("event") == kind}
    return sorted(held.items())


def environment(a: Path, b: Path) -> dict[str, tuple[str, str]]:
    """Returns what differs in where two runs ran: packages, device, threads, processes, platform, code.

    Raises:
        ArtifactError: a lock says no table of it.
    """
    one, other = (_where(folder / "lock.json") for folder in (a, b))
    keys = [key for key in dict.fromkeys([*one, *other]) if not key.startswith(("fingerprints.", "format"))]
    pairs = {key: (one.get(key, "-"), other.get(key, "-")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _where(file: Path) -> dict[str, str]:
    lock = read_json(file)
    found = where_of(lock)
    if found is None:
        if not file.is_file():
            return {}
        told = f"its environment is {lock['environment']!r}" if isinstance(lock, dict) else "it is no table"
        raise ArtifactError(f"{file}: damaged: {told}", hint="spec run of its recipe writes it again")
    return flat(found)
