"""The event log of a run: events.jsonl, appended to while it works and read back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError
from speculators.events import Event, Listen, ProgressEvent, to_json
from speculators.files.disk import disk_errors

# What readers of an event rely on.
_NUMBER = (int, float)
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "StepEvent": {"step": int, "total_steps": int, "loss": _NUMBER, "tokens": int, "tokens_per_second": _NUMBER},
    "EvalEvent": {"step": int, "tau": _NUMBER},
    "StageEvent": {"stage": str, "status": str, "detail": str, "seconds": _NUMBER},
}


@attrs.define(eq=False)
class EventLog:
    """Appends events to a file as JSON lines and passes them on; progress is only passed on.

    Until `file` is known events are kept, so that the first stages are in the log, too.
    """

    then: Listen
    file: Path | None = None
    _kept: list[str] = attrs.field(init=False, factory=list)

    def __call__(self, event: Event) -> None:
        """Takes in one event."""
        if not isinstance(event, ProgressEvent):
            self._kept.append(json.dumps({"time": round(time.time(), 3), **to_json(event)}))
            self.flush()
        self.then(event)

    def open(self, file: Path) -> None:
        """Names the file, whose folder exists."""
        self.file = file
        self.flush()

    def flush(self) -> None:
        """Writes what is kept."""
        if self.file is not None and self._kept:
            with disk_errors(self.file), self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(line + "\n" for line in self._kept)
            self._kept.clear()


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
