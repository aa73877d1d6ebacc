"""Events that stages report while they work: the CLI renders them, tests collect them, runs keep them as JSON lines.

Events carry facts; the sentences that people read are made from them where they are shown (report/progress.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class PreparedFacts:
    """The data that the stage `prepare` made.

    Attributes:
        conversations, tokens, supervised: that are kept; the last counts the tokens that a loss is computed on.
        skipped: rows left out, by reason.
        truncated: conversations cut at `max_tokens`.
    """

    conversations: int
    tokens: int
    supervised: int
    skipped: Mapping[str, int]
    truncated: int
    max_tokens: int


@attrs.frozen(kw_only=True)
class CapturedFacts:
    """The hidden states that the stage `capture` stored.

    Attributes:
        bytes: of the folder.
        server: engine and version that computed them; "" for this process.
    """

    tokens: int
    bytes: int
    folder: str
    server: str = ""


@attrs.frozen(kw_only=True)
class TrainedFacts:
    """The speculator that the stage `train` exported.

    Attributes:
        parameters: that were trained.
        vocabulary: tokens of the verifier; `draft_vocabulary`, those that can be drafted.
        coverage: share of the supervised tokens that can be drafted.
        rare_ends: end-of-turn tokens in the draft vocabulary that are too rare to be there by frequency.
        step: updates of the exported checkpoint, of `total_steps`.
        tau: its exact acceptance length; None without a suite.
    """

    parameters: int
    vocabulary: int
    draft_vocabulary: int
    coverage: float
    rare_ends: tuple[int, ...] = ()
    step: int
    total_steps: int
    tau: float | None


@attrs.frozen(kw_only=True)
class SuiteFacts:
    """The verifier's responses to a suite, against which checkpoints are evaluated."""

    suite: str
    responses: int


@attrs.frozen(kw_only=True)
class StatesCheckFacts:
    """States of a server compared with the verifier's own.

    Attributes:
        compared_tokens: how many were compared.
        error: largest relative difference of a layer.
    """

    compared_tokens: int
    error: float


Facts = PreparedFacts | CapturedFacts | TrainedFacts | SuiteFacts | StatesCheckFacts


@attrs.frozen(kw_only=True)
class StageEvent:
    """A stage of the pipeline starts, is skipped because its output is on disk, or is done.

    Attributes:
        status: "start", "skip" or "done".
        detail: text for people, which no code reads: a place, or why a stage is skipped. Logs of older runs have all
            that was measured in it, and no facts.
        facts: what a stage that is done has measured.
        seconds: that it took.
    """

    stage: str
    status: str
    detail: str = ""
    facts: Facts | None = None
    seconds: float = 0.0


@attrs.frozen(kw_only=True)
class ProgressEvent:
    """How far a long piece of work has come.

    Attributes:
        total: None where it cannot be known.
    """

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
        tokens: in the global batch, without padding.
        tokens_per_second: over the whole launch.
        seconds_left: estimate for the rest of training.
        metrics: reported by the algorithm's forward, averaged like the loss.
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


@attrs.frozen(kw_only=True)
class RunEvent:
    """The run folder is open: from here on, everything of this run goes there."""

    folder: Path


Event = RunEvent | StageEvent | ProgressEvent | StepEvent | EvalEvent | SaveEvent | WarningEvent
Listen = Callable[[Event], None]
Progress = Callable[[ProgressEvent], None]


@attrs.define(eq=False, kw_only=True)
class Pieces:
    """Reports the pieces of a stage's work as one share of the whole, which grows only and ends at 100%.

    Attributes:
        stage: what all of them belong to.
        pieces: how many there will be.
        listen: gets the share, in percent, with the piece at work in the note.
    """

    stage: str
    pieces: int
    listen: Progress
    _begun: int = attrs.field(init=False, default=0)
    _share: float = attrs.field(init=False, default=0.0)

    def piece(self, phases: int = 1, *, weight: int = 1) -> Progress:
        """Begins the next piece; returns what receives its own progress.

        Args:
            phases: of the piece, which differ in the stage that their events name.
            weight: number of pieces that it counts as, because it takes as long.
        """
        before, self._begun = self._begun, self._begun + weight
        names: list[str] = []

        def receive(event: ProgressEvent) -> None:
            if event.stage not in names:
                names.append(event.stage)
            within = min(event.done / event.total, 1.0) if event.total else 0.0
            phase = min(names.index(event.stage), phases - 1)
            self._share = max(self._share, (before + weight * (phase + within) / phases) / self.pieces)
            amount = f"{event.done:,.0f}" + (f" of {event.total:,.0f}" if event.total else "")
            note = " ".join(filter(None, (f"{event.stage}: {amount} {event.unit}".rstrip(), event.note)))
            self.listen(ProgressEvent(stage=self.stage, done=100 * self._share, total=100, unit="%", note=note))

        return receive


def ignore(event: Any) -> None:
    """Drops an event: the listener for callers that need none."""


def to_json(event: Event) -> dict[str, Any]:
    """Turns an event into JSON values, its class under "event"."""
    fields = attrs.asdict(event, value_serializer=lambda _, __, value: str(value) if isinstance(value, Path) else value)
    return {"event": type(event).__name__, **fields}
