"""Runs at a glance: state, changes and best number of each, read from the ends of files and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from speculators.files.disk import read_json
from speculators.files.locks import is_locked
from speculators.runs.places import RunFolder, run_folders
from speculators.runs.recipes import changed_values

# Enough for the last update and the last stage; a log of a long training has many megabytes.
TAIL_BYTES = 1 << 16


@attrs.frozen(kw_only=True)
class BestNumber:
    """The largest acceptance length of the newest benchmark, at its lowest temperature.

    Attributes:
        speed_up: measured live in the same setting; None where it was not.
    """

    suite: str
    num_speculative_tokens: int
    temperature: float
    tau: float
    speed_up: float | None


@attrs.frozen(kw_only=True)
class RunSummary:
    """One run of a list.

    Attributes:
        recipe: name of its recipe; "" where the plan cannot be read.
        last_worked: seconds since the epoch of its last event.
        is_running: whether a launch is at work.
        state: "training 62%", "stopped at 62%", "trained", "measured" or the stage that it is in.
        changes: values from the command line, by TOML path.
        best: None before the benchmark.
    """

    folder: Path
    recipe: str
    last_worked: float | None
    is_running: bool
    state: str
    changes: dict[str, Any]
    best: BestNumber | None

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, with the name of the folder."""
        return {"name": self.folder.name, **attrs.asdict(self), "folder": str(self.folder)}


def summaries(runs: Path) -> list[RunSummary]:
    """Summarises the runs in a folder, the one that worked last first."""
    known = [summary(run) for run in run_folders(runs)]
    return sorted(known, key=lambda each: each.last_worked or 0.0, reverse=True)


def summary(run: RunFolder) -> RunSummary:
    """Summarises one run; what is missing or damaged is left out."""
    plan, best, events = read_json(run.plan), _best(run), list(_last_events(run.events))
    recipe = plan.get("recipe") if isinstance(plan, dict) else None
    is_running = is_locked(run.path)
    return RunSummary(
        folder=run.path,
        recipe=str(recipe.get("name", "")) if isinstance(recipe, dict) else "",
        last_worked=events[-1]["time"] if events else None,
        is_running=is_running,
        state=_state(run, events, is_running=is_running, is_measured=best is not None),
        changes={path: value for path, value in changed_values(run).items() if path != "name"},
        best=best,
    )


def _last_events(file: Path) -> Iterator[dict[str, Any]]:
    """Reads the events at the end of a log; lines cut short are skipped."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("time"), (int, float)):
            yield values


def _state(run: RunFolder, events: list[dict[str, Any]], *, is_running: bool, is_measured: bool) -> str:
    stages = [event for event in events if event.get("event") == "StageEvent"]
    current = str(stages[-1].get("stage")) if stages else ""
    if run.trained.is_file():
        if is_running:
            return f"running: {current}"
        return "measured" if is_measured else "trained"
    updates = [event for event in events if event.get("event") == "StepEvent"]
    if updates and (total := updates[-1].get("total_steps")):
        share = f"{updates[-1].get('step', 0) / total:.0%}"
        return f"training {share}" if is_running else f"stopped at {share}"
    if is_running:
        return f"running: {current}" if current else "running"
    return f"stopped in {current}" if current else "not begun"


def _best(run: RunFolder) -> BestNumber | None:
    """Reads the best number of the newest readable benchmark."""
    for file in sorted(run.bench.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        document = read_json(file)
        try:
            numbers = [_number(setting) for setting in document["settings"]]
            return max(numbers, key=lambda each: (-each.temperature, each.tau))
        except (KeyError, TypeError, ValueError):  # damaged, or of another format
            continue
    return None


def _number(setting: dict[str, Any]) -> BestNumber:
    live = setting["live"]
    return BestNumber(
        suite=str(setting["suite"]),
        num_speculative_tokens=int(setting["num_speculative_tokens"]),
        temperature=float(setting["temperature"]),
        tau=float(setting["exact"]["tau"]),
        speed_up=float(live["speed"]["speed_up"]) if live else None,
    )
