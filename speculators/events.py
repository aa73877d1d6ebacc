"""What stages tell while they work; the CLI renders events, tests read them as a list, runs keep them as JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class StageEvent:
    """A stage of the pipeline starts, is skipped because its output is on disk, or is done."""

    stage: str
    status: str
    detail: str = ""
    seconds: float = 0.0


@attrs.frozen(kw_only=True)
class ProgressEvent:
    """How far a long piece of work has come; `total` is None where it cannot be known."""

    stage: str
    done: float
    total: float | None = None
    unit: str = ""
    note: str = ""


@attrs.frozen(kw_only=True)
class StepEvent:
    """One optimizer update.

    Attributes:
        step: updates made so far, from 1.
        loss: mean over the supervised tokens of the global batch.
        tokens: tokens of the global batch, padding left out.
        tokens_per_second: over the whole launch.
        seconds_left: estimate for the rest of training.
        metrics: what the algorithm's forward reported, averaged like the loss.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds_left: float
    metrics: dict[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class EvalEvent:
    """Exact acceptance length on the held-out suite, by replay; the best checkpoint is chosen by `tau`."""

    step: int
    tau: float
    metrics: dict[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class SaveEvent:
    """A checkpoint is complete on disk."""

    step: int
    path: Path
    best: bool


@attrs.frozen(kw_only=True)
class WarningEvent:
    """Something the user should know, with its consequence."""

    message: str


Event = StageEvent | ProgressEvent | StepEvent | EvalEvent | SaveEvent | WarningEvent
Listen = Callable[[Event], None]
Progress = Callable[[ProgressEvent], None]


def ignore(event: Any) -> None:
    """The listener of those who do not listen."""


def to_json(event: Event) -> dict[str, Any]:
    """Returns the event as a dict of JSON values, its class under "event"."""
    fields = attrs.asdict(event, value_serializer=lambda _, __, value: str(value) if isinstance(value, Path) else value)
    return {"event": type(event).__name__, **fields}
