"""The event log of a run: events.jsonl, appended to while it works and read back as typed events."""

from __future__ import annotations

import json
import math
import time
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs

from speculators.errors import ArtifactError
from speculators.events import (
    EvalEvent,
    Event,
    Facts,
    Listen,
    ProgressEvent,
    RunEvent,
    SaveEvent,
    StageEvent,
    StepEvent,
    WarningEvent,
    to_json,
)
from speculators.files.disk import disk_errors
from speculators.structure.converter import structure

Kind = TypeVar("Kind", RunEvent, StageEvent, StepEvent, EvalEvent, SaveEvent, WarningEvent)
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (RunEvent, StageEvent, StepEvent, EvalEvent, SaveEvent, WarningEvent)
}


@attrs.define(eq=False)
class EventLog:
    """Appends events to a file as JSON lines and passes them on; progress is only passed on.

    Until `file` is known events wait in memory, so that the first stages are in the log, too.
    """

    then: Listen
    file: Path | None = None
    _waiting: list[str] = attrs.field(init=False, factory=list)

    def __call__(self, event: Event) -> None:
        """Takes in one event."""
        if not isinstance(event, ProgressEvent):
            self._waiting.append(json.dumps({"time": round(time.time(), 3), **to_json(event)}))
            self._flush()
        self.then(event)

    def open(self, file: Path) -> None:
        """Names the file, whose folder must exist, and writes the events that wait."""
        self.file = file
        self._flush()

    def _flush(self) -> None:
        if self.file is not None and self._waiting:
            with disk_errors(self.file), self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(line + "\n" for line in self._waiting)
            self._waiting.clear()


@attrs.frozen
class LoggedEvent:
    """An event with its place in time.

    Attributes:
        time: seconds since the epoch.
    """

    time: float
    event: Event


@attrs.frozen
class RunLog:
    """The events of a run in the order in which they were written, those of interrupted launches included."""

    events: tuple[LoggedEvent, ...] = ()

    @classmethod
    def read(cls, file: Path) -> RunLog:
        """Reads a log; one that does not exist is empty, and lines cut short by a kill are skipped.

        Raises:
            ArtifactError: an event of a known kind lacks a value, or has one of the wrong type.
        """
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        events, last = [], 0.0
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
            except ValueError:
                continue
            # Kinds that this version does not know are somebody else's: skipped, too.
            if isinstance(values, dict) and (kind := _KINDS.get(str(values.get("event")))):
                last = float(values.get("time", last))
                events.append(LoggedEvent(last, _event(kind, values, f"{file}:{number}")))
        return cls(tuple(events))

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Lists the events of one kind in order."""
        return [entry.event for entry in self.events if isinstance(entry.event, kind)]

    def updates(self) -> list[StepEvent]:
        """Lists each update once, by number: a resumed run repeats some, and the last record counts."""
        return _last_of_each(self.of(StepEvent))

    def evaluations(self) -> list[EvalEvent]:
        """Lists each evaluation once, by the number of its update; the last record counts."""
        return _last_of_each(self.of(EvalEvent))

    def stage_seconds(self) -> dict[str, float]:
        """Measures how long each finished stage took, launches that were interrupted in it included."""
        seconds: dict[str, float] = {}
        lost: dict[str, float] = {}
        open_stage: str | None = None
        began = last = 0.0
        for entry in self.events:
            event, now = entry.event, entry.time
            if isinstance(event, StageEvent):
                if event.status == "done":
                    seconds[event.stage] = event.seconds + lost.pop(event.stage, 0.0)
                elif open_stage is not None:
                    # Stages do not overlap, so this is another launch: the one before worked until its last event.
                    lost[open_stage] = lost.get(open_stage, 0.0) + last - began
                open_stage, began = (event.stage, now) if event.status == "start" else (None, now)
            last = now
        return seconds


Numbered = TypeVar("Numbered", StepEvent, EvalEvent)


def _last_of_each(events: Iterable[Numbered]) -> list[Numbered]:
    return [event for _, event in sorted({event.step: event for event in events}.items())]


def _event(kind: type[Any], values: Mapping[str, Any], where: str) -> Event:
    """Builds an event from a line; keys that this version does not know are left out."""
    fields = attrs.fields_dict(kind)
    known = {name: values[name] for name in fields if name in values}
    if lacking := [name for name, field in fields.items() if field.default is attrs.NOTHING and name not in known]:
        raise _damaged(where, f"{kind.__name__} without {', '.join(lacking)}")
    if "metrics" in known and isinstance(known["metrics"], dict):
        # A plug-in may log nan, which the strict converter refuses, and which says nothing.
        known["metrics"] = {name: value for name, value in known["metrics"].items() if not _is_nan(value)}
    # Facts of another version are unknown here: the event still counts.
    facts = _facts(known.pop("facts", None)) if kind is StageEvent else None
    for name in {"path", "folder"} & known.keys():
        known[name] = Path(str(known[name]))
    if kind in (RunEvent, SaveEvent):
        made: Event = kind(**known)
        return made
    event, problems = structure(known, kind)
    if event is None:
        raise _damaged(where, f"{kind.__name__}: {'; '.join(str(problem) for problem in problems)}")
    return attrs.evolve(event, facts=facts) if facts is not None else event


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _facts(values: Any) -> Facts | None:
    """Builds the facts of a stage; their keys identify the class."""
    if not isinstance(values, dict):
        return None
    candidates = (structure(values, kind)[0] for kind in typing.get_args(Facts))
    return next((facts for facts in candidates if facts is not None), None)


def _damaged(where: str, problem: str) -> ArtifactError:
    return ArtifactError(f"{where}: damaged: {problem}", hint="delete the line, if you know what wrote it")
