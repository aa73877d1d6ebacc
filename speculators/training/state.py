"""What resumes, and what a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs
import torch

from speculators.nn.layout import RowLayout
from speculators.recipe.schema import ScheduleSection


@attrs.frozen(kw_only=True)
class TrainState:
    """All of a run that is not a tensor.

    Attributes:
        step: updates made so far.
        tokens: tokens trained on so far, over all processes, padding left out.
        best_tau: the largest exact acceptance length so far; None before the first evaluation.
        best_step: the update after which it was reached.
    """

    step: int = 0
    tokens: int = 0
    best_tau: float | None = None
    best_step: int | None = None

    def after_update(self, tokens: int) -> TrainState:
        """Returns the state after one more update, on so many tokens."""
        return attrs.evolve(self, step=self.step + 1, tokens=self.tokens + tokens)

    def after_evaluation(self, tau: float) -> TrainState:
        """Returns the state after an evaluation; of equal acceptance lengths the first stays the best."""
        if self.best_tau is not None and tau <= self.best_tau:
            return self
        return attrs.evolve(self, best_tau=tau, best_step=self.step)


@attrs.frozen(kw_only=True, eq=False)
class BatchRow:
    """One packed row.

    Attributes:
        tensors: what `forward` receives, by name; shapes [1, S, ...].
        supervised: its supervised tokens, `loss_mask.sum()`, known without asking the device.
        index: its place in the global batch, the same for any number of processes.
        documents: names of its documents, for messages.
        layout: where its documents lie, for a forward that would otherwise have to ask the device; None if not known.
    """

    tensors: Mapping[str, torch.Tensor]
    supervised: int
    index: int
    documents: tuple[str, ...] = ()
    layout: RowLayout | None = None


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """This process's part of the global batch of one update.

    Attributes:
        epoch: from 0.
        rows: made as they are asked for, so that one row is in memory at a time.
        num_rows: how many `rows` gives; the same on every process, or the collectives would never meet.
        tokens: of the global batch, padding left out.
        supervised: supervised tokens of the global batch.
    """

    epoch: int
    rows: Iterable[BatchRow]
    num_rows: int
    tokens: int
    supervised: int


@attrs.frozen(kw_only=True)
class Job:
    """What one call of `train` is to do.

    Attributes:
        total_steps: updates of the whole run, those before a resume included.
        seed: of the rows' random numbers.
        folder: where the checkpoints are kept, and from where an earlier call goes on.
        fingerprint: of the train stage; a checkpoint with another one is refused.
        shard: shard parameters and optimizer over the processes; else each keeps a copy.
    """

    schedule: ScheduleSection
    total_steps: int
    seed: int
    folder: Path
    fingerprint: str
    shard: bool = True


Batches = Callable[[int], Batch]
Evaluate = Callable[[], tuple[float, dict[str, float]]]
