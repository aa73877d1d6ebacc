"""Measurements of earlier runs: the seconds that stages took, and how many tokens per second they reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError
from speculators.events import CapturedFacts, StageEvent, TrainedFacts
from speculators.files.disk import read_json
from speculators.runs.log import RunLog
from speculators.runs.places import RunFolder


@attrs.frozen(kw_only=True)
class RunRecord:
    """What one run measured.

    Attributes:
        folder: of the run.
        fingerprints: of its stages.
        device: "cpu" or "cuda".
        seconds: that each finished stage took, as `RunLog.stage_seconds`.
        tokens_per_second: while capturing and training, over the whole launch.
        tokens: that capture and training worked on.
        coverage: share of the supervised tokens in the draft vocabulary; None where the log does not have it.
    """

    folder: RunFolder
    fingerprints: Mapping[str, str]
    device: str
    seconds: Mapping[str, float]
    tokens_per_second: Mapping[str, float]
    tokens: Mapping[str, int]
    coverage: float | None

    @property
    def run(self) -> str:
        """The name of the run folder."""
        return self.folder.name


def records(runs: Path, device: str | None = None) -> list[RunRecord]:
    """Reads the measurements of all runs, newest first, skipping damaged folders and those that are not runs.

    Args:
        device: read only runs on this one, "cpu" or "cuda"; None for all.
    """
    logs = [run.events for folder in runs.glob("*") if (run := RunFolder(folder)).events.is_file()]
    known = []
    for file in sorted(logs, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            run_record = record(RunFolder(file.parent))
        except ArtifactError:
            continue
        if run_record is not None and device in (None, run_record.device):
            known.append(run_record)
    return known


def record(run: RunFolder) -> RunRecord | None:
    """Reads what a run measured; None if its lock does not name a device. Raises ArtifactError for a damaged log."""
    lock = read_json(run.lock)
    where = environment_of(lock)
    if where is None or "device" not in where or not isinstance(lock.get("fingerprints"), dict):
        return None
    log = RunLog.read(run.events)
    seconds = log.stage_seconds()
    speeds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    coverage = None
    for event in log.of(StageEvent):
        # Runs that predate facts have their numbers in sentences only, which nobody parses.
        if isinstance(event.facts, CapturedFacts) and seconds["capture"] > 0:
            tokens["capture"] = event.facts.tokens
            speeds["capture"] = event.facts.tokens / seconds["capture"]
        elif isinstance(event.facts, TrainedFacts):
            coverage = event.facts.coverage
    if updates := log.updates():
        tokens["train"] = sum(update.tokens for update in updates)
        speeds["train"] = statistics.median(update.tokens_per_second for update in updates)
    return RunRecord(
        folder=run,
        fingerprints=lock["fingerprints"],
        device=where["device"],
        seconds=seconds,
        tokens_per_second=speeds,
        tokens=tokens,
        coverage=coverage,
    )


def environment_of(lock: Any) -> Mapping[str, Any] | None:
    """Finds the environment in a lock's JSON values; None if it has none. Format 1 kept it at the lock's top level."""
    where = lock.get("environment", lock) if isinstance(lock, dict) else None
    return where if isinstance(where, dict) else None


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens nested tables to text values by dotted path."""
    texts: dict[str, str] = {}
    for key, value in table.items():
        texts |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return texts
