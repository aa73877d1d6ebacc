"""What run folders hold, gathered as JSON values for a report; what is not there is told, never an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.diff.comparison import Comparison
from speculators.diff.measured import compare_with_records, points
from speculators.diff.side import DiffSide
from speculators.errors import ArtifactError
from speculators.files.disk import read_json
from speculators.recipe.expect import band_lines, compare_bands
from speculators.recipe.plan import read_plan
from speculators.recipe.schema import Expect
from speculators.recipe.values import flatten_tables
from speculators.runs.benches import read_benches
from speculators.runs.log import read_events, stage_seconds
from speculators.runs.records import flat
from speculators.runs.stages import TRAINED

# Points of a curve; a longer one is told by the means of so many equal parts.
POINTS = 400
# By what a folder is known as a run.
MARKS = ("plan.json", "events.jsonl")
_STATUS = {"none": "not begun", "start": "begun, not ended", "done": "done", "skip": "was done before"}
Values = dict[str, Any]


@attrs.frozen(kw_only=True)
class RunDiff:
    """Two runs compared, or why they cannot be.

    Attributes:
        a, b: the names that the report gives the runs.
        comparison: None where a run is damaged.
        error: the damage; "" otherwise.
    """

    a: str
    b: str
    comparison: Comparison | None
    error: str = ""


def gather(folders: Sequence[Path]) -> Values:
    """Returns everything that a report of these runs tells.

    Args:
        folders: of the runs; the others are compared with the first.

    Raises:
        ArtifactError: a folder is no run.
    """
    for folder in folders:
        if not any((folder / mark).is_file() for mark in MARKS):
            found = "no run: it has neither plan.json nor events.jsonl" if folder.is_dir() else "no such folder"
            raise ArtifactError(f"{folder}: {found}", hint="spec ls lists the runs")
    names = _names(folders)
    first, *others = names
    return {
        "runs": [gather_run(folder, name) for folder, name in names.items()],
        "diffs": [_diff(first, other, names[first], names[other]) for other in others],
    }


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Returns each run once, under the name of its folder, or where two share one under its path."""
    runs = {folder.resolve(): str(folder) for folder in folders}
    held = [folder.name for folder in runs]
    return {folder: folder.name if held.count(folder.name) == 1 else path for folder, path in runs.items()}


def gather_run(folder: Path, name: str) -> Values:
    """Returns what one run tells; `missing` says in words what is not there, and why where that can be known."""
    lock, trained = (_table(folder / name) for name in ("lock.json", TRAINED))
    plan = _plan(folder)
    recipe = plan["recipe"] if plan else None
    events, torn = _events(folder / "events.jsonl")
    benches = read_benches(folder)
    settings = [{key: value for key, value in each.items() if key != "by_prompt"} for each in benches.settings]
    state, unfinished = _state(trained, events, torn)
    text = folder / "recipe.toml"
    return {
        "name": name,
        "summary": recipe["summary"] if recipe else "",
        "state": state,
        "missing": [
            *([] if recipe else ["plan.json is missing or damaged: there is no plan, no recipe and no diff to tell"]),
            *([] if lock else ["lock.json is missing or damaged: where this ran is not known"]),
            *([torn] if torn else []),
            *unfinished,
            *_lacking(recipe, settings, trained is not None),
            *benches.unread,
        ],
        "loss": thinned(points(events, "StepEvent", "loss"), POINTS),
        "tau": thinned(points(events, "EvalEvent", "tau"), POINTS),
        "tau_of": _tau_of(recipe),
        "stages": _stages(plan, events),
        "plan": _derived(plan) if recipe else {},
        "recipe": flatten_tables(recipe) if recipe else {},
        "recipe_text": text.read_text(encoding="utf-8", errors="replace") if text.is_file() else "",
        "lock": _lock_values(lock or {}),
        "settings": settings,
        "benches": list(benches.files),
        "expect": _expect(recipe, settings),
    }


def _lock_values(lock: Mapping[str, Any]) -> dict[str, str]:
    """Returns what of a lock is for people; its recipe and the fingerprints' inputs have places of their own."""
    held = lock.get("verifier")
    verifier = {"verifier": held["files"]} if isinstance(held, dict) and isinstance(held.get("files"), dict) else {}
    told = {key: value for key, value in lock.items() if key not in ("recipe", "inputs", "verifier", "resumed_in")}
    return flat({**told, **verifier})


def _table(file: Path) -> Values | None:
    held = read_json(file)
    return held if isinstance(held, dict) else None


def _plan(folder: Path) -> Values | None:
    """Returns the plan of a run, None where it cannot be read."""
    try:
        return read_plan(folder)
    except ArtifactError:
        return None


def _events(file: Path) -> tuple[list[Values], str]:
    """Returns the events of a run, and why there are none."""
    try:
        events = read_events(file)
    except ArtifactError as error:
        return [], f"{error}: there are no curves and no times"
    return events, "" if events else "events.jsonl is missing or empty: there are no curves and no times"


def _state(trained: Values | None, events: Sequence[Values], torn: str) -> tuple[str, list[str]]:
    """Returns in words how far training came, and what that means if it is not at its end."""
    if trained is not None:
        best = "" if trained["tau"] is None else f"; tau there {trained['tau']:.3f}"
        return f"trained, {trained['total_steps']} updates; exported from update {trained['step']}{best}", []
    steps = [event for event in events if event.get("event") == "StepEvent"]
    if not steps:
        return ("not known", []) if "damaged" in torn else ("not trained", ["training has not begun"])
    words = f"training stopped after update {steps[-1]['step']} of {steps[-1]['total_steps']}"
    return words, [f"{words}: spec run of its recipe goes on from the last checkpoint"]


def _lacking(recipe: Values | None, settings: Sequence[Values], trained: bool) -> list[str]:
    """Returns what is missing of the benchmark."""
    if settings:
        silent = sorted({setting["num_speculative_tokens"] for setting in settings if setting["live"] is None})
        told = f"no live decode, and so no speed-up, at K={', '.join(map(str, silent))}"
        return [told] if silent else []
    if recipe and not recipe["benchmark"]["suites"]:
        return ["the recipe names no suite: acceptance was not measured (spec bench RUN --suite NAME)"]
    return ["there is no benchmark" + (": spec run of its recipe goes on with it" if trained else "")]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[list[float]]:
    """Returns the means of `most` equal parts, or the points themselves where they are no more."""
    if len(points) <= most:
        return [list(point) for point in points]
    cuts = [round(index * len(points) / most) for index in range(most + 1)]
    parts = [points[cuts[index] : cuts[index + 1]] for index in range(most)]
    return [[sum(values) / len(part) for values in zip(*part, strict=True)] for part in parts]


def _tau_of(recipe: Values | None) -> str:
    """Returns which setting the evaluations during training measure."""
    if not recipe or not recipe["benchmark"]["suites"]:
        return ""
    bench = recipe["benchmark"]
    k, temperature = max(bench["num_speculative_tokens"]), bench["temperature"][0]
    return f"{bench['suites'][0]['name']}, K={k}, T={temperature:g}"


def _stages(plan: Values | None, events: Sequence[Values]) -> list[Values]:
    """Returns the stages with what was told of each last: a stage that was skipped later keeps its time."""
    told: dict[str, Values] = {}
    for event in events:
        if event.get("event") == "StageEvent" and (event["status"] != "skip" or event["stage"] not in told):
            told[event["stage"]] = event
    took = stage_seconds(events)
    prints = {stage["name"]: stage["fingerprint"] for stage in plan["stages"]} if plan else {}
    none: Values = {"status": "none", "detail": "", "seconds": 0.0}
    return [
        {
            "name": name,
            "fingerprint": prints.get(name),
            "status": _STATUS[event["status"]],
            "seconds": took.get(name) if event["status"] == "done" else None,
            "detail": event["detail"],
        }
        for name, event in (dict.fromkeys(prints, none) | told).items()
    ]


def _derived(plan: Values | None) -> dict[str, str]:
    """Returns what the plan says beyond the recipe and the stages."""
    return flat(
        {key: value for key, value in (plan or {}).items() if key not in ("recipe", "stages", "run_name", "origins")}
    )


def _expect(recipe: Values | None, settings: Sequence[Values]) -> list[str]:
    bands: Mapping[str, Values] = recipe["expect"] if recipe else {}
    expect = {name: Expect(tau=tuple(band["tau"]), source=band["source"]) for name, band in bands.items()}
    return band_lines(compare_bands(expect, settings))


def _diff(a: Path, b: Path, name: str, other: str) -> RunDiff:
    try:
        sides = DiffSide.of_run(name, a), DiffSide.of_run(other, b)
        return RunDiff(a=name, b=other, comparison=compare_with_records(*sides, a.parent))
    except ArtifactError as error:
        return RunDiff(a=name, b=other, comparison=None, error=str(error))
