"""What runs on this machine measured: the seconds of a stage that ran before, and how fast products were made."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError
from speculators.files.disk import read_json
from speculators.runs.log import read_events, stage_seconds

_TOKENS = re.compile(r"([\d,]+) tokens")
_COVERAGE = re.compile(r"([\d.]+)% of the supervised ones")


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
