"""What runs on this machine measured: the seconds of a stage that ran before, and how fast products were made."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.config import VerifierFacts
from speculators.data.files import read_json
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.pipeline.context import Places
from speculators.pipeline.sizes import costs_of
from speculators.recipe.costs import Costs
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.verifier.sources import held_folder

_TOKENS = re.compile(r"([\d,]+) tokens")
_COVERAGE = re.compile(r"([\d.]+)% of the supervised ones")
# What readers of an event rely on.
_NUMBER = (int, float)
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "StepEvent": {"step": int, "total_steps": int, "loss": _NUMBER, "tokens": int, "tokens_per_second": _NUMBER},
    "EvalEvent": {"step": int, "tau": _NUMBER},
    "StageEvent": {"stage": str, "status": str, "detail": str, "seconds": _NUMBER},
}


@attrs.frozen(kw_only=True)
class Record:
    """What one run measured.

    Attributes:
        run: the name of its folder.
        fingerprints: of its stages.
        device: "cpu" or "cuda".
        seconds: of each stage, as `stage_seconds`.
        tokens_per_second: while capturing and training, over the whole launch.
        tokens: that capture and training worked on.
        coverage: share of the supervised tokens that the draft vocabulary has; None where it was not told.
    """

    run: str
    folder: Path
    fingerprints: Mapping[str, str]
    device: str
    seconds: Mapping[str, float]
    tokens_per_second: Mapping[str, float]
    tokens: Mapping[str, int]
    coverage: float | None


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


def records(runs: Path, device: str | None = None) -> list[Record]:
    """Returns what runs measured, the newest first; folders that are no runs, or damaged ones, are passed over.

    Args:
        device: only of runs on such a one; None for all.
    """
    found = []
    for file in sorted(runs.glob("*/events.jsonl"), key=_written, reverse=True):
        try:
            held = record(file.parent)
        except ArtifactError:
            continue
        if held is not None and device in (None, held.device):
            found.append(held)
    return found


def _written(file: Path) -> float:
    return file.stat().st_mtime


def record(folder: Path) -> Record | None:
    """Returns what a run measured, None where it did not say where it ran; raises ArtifactError for a damaged log."""
    lock = read_json(folder / "lock.json")
    where = where_of(lock)
    if where is None or "device" not in where or not isinstance(lock.get("fingerprints"), dict):
        return None
    events = read_events(folder / "events.jsonl")
    seconds = stage_seconds(events)
    speeds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    coverage = None
    steps: dict[int, Mapping[str, Any]] = {}
    for event in events:
        if event.get("event") == "StepEvent":
            steps[event["step"]] = event
        elif event.get("event") == "StageEvent" and event["status"] == "done":
            if event["stage"] == "capture" and (told := _TOKENS.search(event["detail"])) and seconds["capture"] > 0:
                tokens["capture"] = int(told.group(1).replace(",", ""))
                speeds["capture"] = tokens["capture"] / seconds["capture"]
            elif event["stage"] == "train" and (told := _COVERAGE.search(event["detail"])):
                coverage = float(told.group(1)) / 100
    if steps:
        tokens["train"] = sum(step["tokens"] for step in steps.values())
        speeds["train"] = statistics.median(step["tokens_per_second"] for step in steps.values())
    return Record(
        run=folder.name,
        folder=folder,
        fingerprints=lock["fingerprints"],
        device=where["device"],
        seconds=seconds,
        tokens_per_second=speeds,
        tokens=tokens,
        coverage=coverage,
    )


def stage_seconds(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns how long each stage took that came to its end, with the launches that were interrupted in it."""
    seconds: dict[str, float] = {}
    lost: dict[str, float] = {}
    open_stage: str | None = None
    began = last = 0.0
    for event in events:
        now = event.get("time", last)
        if event.get("event") == "StageEvent":
            stage, status = event["stage"], event["status"]
            if status == "done":
                seconds[stage] = event["seconds"] + lost.pop(stage, 0.0)
            elif open_stage is not None:
                # Stages do not overlap: another launch begins, and that one worked until the last that it told.
                lost[open_stage] = lost.get(open_stage, 0.0) + last - began
            open_stage, began = (stage, now) if status == "start" else (None, now)
        last = now
    return seconds


def read_events(file: Path) -> list[dict[str, Any]]:
    """Returns the events of a log, none where there is no log; a run that was killed may have left a part of a line.

    Raises:
        ArtifactError: an event lacks what it is about.
    """
    events = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            fields = _FIELDS.get(str(event.get("event")), {})
            if wrong := [name for name, kind in fields.items() if not isinstance(event.get(name), kind)]:
                words = f"{file}:{number}: damaged: {event['event']} without {', '.join(wrong)}"
                raise ArtifactError(words, hint="delete the line, if you know what wrote it")
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

    `--set` is not in the recipe that a run keeps: only one that still gives the run's own fingerprint is taken. Nor
    is a plug-in imported that the plan does not have: it is somebody's program, and has nothing to do with the plan.
    """
    held = read_json(record.folder / "plan.json")
    try:
        module = held["recipe"]["algorithm"].get("module")
    except (AttributeError, KeyError, TypeError):
        return None
    if module not in (None, plan.recipe.algorithm.module):
        return None
    try:
        recipe = load_recipe(str(record.folder / "recipe.toml"))
        folder = held_folder(recipe.verifier, cache=places.verifiers)
        same = recipe.verifier == plan.recipe.verifier
        facts = plan.facts if same else VerifierFacts.read(folder / "config.json") if folder else None
        if facts is None:
            return None
        found = make_plan(recipe, facts)
        if "precision" in held:  # what it computed in there; older runs do not tell
            found = attrs.evolve(found, precision=held["precision"])
        own = found.stage("train").fingerprint == record.fingerprints.get("train")
        return costs_of(found, places) if own else None
    except SpeculatorsError:
        return None


def where_of(lock: Any) -> Mapping[str, Any] | None:
    """Returns where a run began, as its lock says it; locks of format 1 have it at their top. None where none says."""
    where = lock.get("environment", lock) if isinstance(lock, dict) else None
    return where if isinstance(where, dict) else None


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the values of nested tables as text, by dotted path."""
    found: dict[str, str] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return found
