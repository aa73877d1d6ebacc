"""What runs on this machine measured: the seconds of a stage that ran before, and how fast products were made."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.bench.compare import differences
from speculators.config import VerifierFacts
from speculators.errors import SpeculatorsError
from speculators.pipeline.context import Places, read_json
from speculators.pipeline.sizes import costs_of
from speculators.recipe.costs import Costs
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.verifier.sources import held_folder

_TOKENS = re.compile(r"([\d,]+) tokens")


@attrs.frozen(kw_only=True)
class Record:
    """What one run measured.

    Attributes:
        run: the name of its folder.
        fingerprints: of its stages.
        device: "cpu" or "cuda".
        seconds: of each stage that ran from start to end.
        tokens_per_second: while capturing and training, over the whole launch.
    """

    run: str
    folder: Path
    fingerprints: Mapping[str, str]
    device: str
    seconds: Mapping[str, float]
    tokens_per_second: Mapping[str, float]


@attrs.frozen(kw_only=True)
class Measured:
    """A time that rests on a run.

    Attributes:
        how: "measured" for the same work, or by the speed of other work.
        run: which one.
    """

    seconds: float
    how: str
    run: str


def records(runs: Path, device: str) -> list[Record]:
    """Returns what the runs on such a device measured, the newest first; folders that are no runs are passed over."""
    found = [_record(file.parent) for file in sorted(runs.glob("*/events.jsonl"), key=_written, reverse=True)]
    return [record for record in found if record is not None and record.device == device]


def _written(file: Path) -> float:
    return file.stat().st_mtime


def _record(folder: Path) -> Record | None:
    lock = read_json(folder / "lock.json")
    where = _environment(lock)
    if not isinstance(lock, dict) or "fingerprints" not in lock or "device" not in where:
        return None
    seconds: dict[str, float] = {}
    speeds: dict[str, float] = {}
    steps: list[float] = []
    for event in read_events(folder / "events.jsonl"):
        if event.get("event") == "StepEvent":
            steps.append(event["tokens_per_second"])
        elif event.get("event") == "StageEvent" and event["status"] == "done":
            seconds[event["stage"]] = event["seconds"]
            if event["stage"] == "capture" and (told := _TOKENS.search(event["detail"])) and event["seconds"] > 0:
                speeds["capture"] = int(told.group(1).replace(",", "")) / event["seconds"]
    if steps:
        speeds["train"] = statistics.median(steps)
    return Record(
        run=folder.name,
        folder=folder,
        fingerprints=lock["fingerprints"],
        device=where["device"],
        seconds=seconds,
        tokens_per_second=speeds,
    )


def read_events(file: Path) -> list[dict[str, Any]]:
    """Returns the events of a log, none where there is no log; a run that was killed may have left a part of a line."""
    events = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def measured(costs: Costs, places: Places) -> dict[str, Measured]:
    """Returns the time of each stage on this machine, as far as runs tell.

    A stage of the same fingerprint takes what it took. Capture and training of other sizes make their products at the
    speed that the newest run of the same precision reached.
    """
    known = records(places.runs, "cuda" if torch.cuda.is_available() else "cpu")
    told: dict[str, Measured] = {}
    for stage in costs.plan.stages:
        for record in known:
            if record.fingerprints.get(stage.name) == stage.fingerprint and stage.name in record.seconds:
                told[stage.name] = Measured(seconds=record.seconds[stage.name], how="measured", run=record.run)
                break
    work = {stage: flops for stage, flops in costs.flops().items() if flops is not None and stage not in told}
    return {**told, **_by_speed(costs, places, known, work)}


def _by_speed(costs: Costs, places: Places, known: list[Record], work: Mapping[str, float]) -> dict[str, Measured]:
    for record in known:
        stages = work.keys() & record.tokens_per_second.keys()
        other = _costs_of_run(record, costs.plan, places) if stages else None
        if other is None or _precision(other.plan) != _precision(costs.plan):
            continue
        a_token = {"capture": other.verifier.flops(other.mean_tokens), "train": _train_flops_a_token(other)}
        return {
            stage: Measured(
                seconds=work[stage] / (record.tokens_per_second[stage] * a_token[stage]),
                how="by the speed of",
                run=record.run,
            )
            for stage in sorted(stages)
            if a_token[stage]
        }
    return {}


def _train_flops_a_token(costs: Costs) -> float:
    """Returns the operations a token that is trained on, updates of the optimizer included."""
    whole = costs.flops()["train"]
    return whole / costs.amount.trained if whole and costs.amount.trained else 0.0


def _precision(plan: Plan) -> tuple[str, str]:
    return plan.precision, plan.recipe.data.states_dtype


def _costs_of_run(record: Record, plan: Plan, places: Places) -> Costs | None:
    """Returns what a run cost in products; None where its recipe, verifier or algorithm are not at hand any more.

    `--set` is not in the recipe that a run keeps: only one that still gives the run's own fingerprint is taken.
    """
    try:
        recipe = load_recipe(str(record.folder / "recipe.toml"))
        folder = held_folder(recipe.verifier, cache=places.verifiers)
        same = recipe.verifier == plan.recipe.verifier
        facts = plan.facts if same else VerifierFacts.read(folder / "config.json") if folder else None
        if facts is None:
            return None
        found, held = make_plan(recipe, facts), read_json(record.folder / "plan.json")
        if isinstance(held, dict) and "precision" in held:  # what it computed in there; older runs do not tell
            found = attrs.evolve(found, precision=held["precision"])
        own = found.stage("train").fingerprint == record.fingerprints.get("train")
        return costs_of(found, places) if own else None
    except SpeculatorsError:
        return None


def newest_bench(folder: Path) -> dict[str, Any] | None:
    """Returns a run's last benchmark as JSON values, None without one."""
    files = sorted((folder / "bench").glob("*.json"), key=_written)
    return read_json(files[-1]) if files else None


def curve(folder: Path) -> dict[str, list[float]]:
    """Returns a run's training loss, and its exact acceptance length at each evaluation, in order."""
    events = read_events(folder / "events.jsonl")
    return {
        "loss": [event["loss"] for event in events if event.get("event") == "StepEvent"],
        "tau": [event["tau"] for event in events if event.get("event") == "EvalEvent"],
    }


def results(a: Path, b: Path) -> dict[str, Any]:
    """Returns what a comparison of two runs has beside that of their recipes: metrics, curves, environments."""
    one, other = newest_bench(a), newest_bench(b)
    return {
        "metrics": differences(one, other) if one and other else [],
        "curves": {"a": curve(a), "b": curve(b)},
        "environment": environment(a, b),
    }


def environment(a: Path, b: Path) -> dict[str, tuple[str, str]]:
    """Returns what differs in where two runs ran: packages, device, threads, processes, platform."""
    one, other = (flat(_environment(read_json(folder / "lock.json"))) for folder in (a, b))
    keys = [key for key in dict.fromkeys([*one, *other]) if not key.startswith(("fingerprints.", "format"))]
    pairs = {key: (one.get(key, "-"), other.get(key, "-")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _environment(lock: Any) -> Mapping[str, Any]:
    """Returns where a run began; locks of format 1 have it at their top."""
    if not isinstance(lock, dict):
        return {}
    return lock.get("environment", lock)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the values of nested tables as text, by dotted path."""
    found: dict[str, str] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return found
