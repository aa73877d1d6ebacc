"""The values that a training run consists of: what resumes, the rows of an update, the job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs
import torch

from speculators.nn.layout import RowLayout
from speculators.recipe.schema import ScheduleSection


@attrs.frozen(kw_only=True)
class TrainState:
    """Everything about a run that is not a tensor.

    Attributes:
        step: updates made so far.
        tokens: tokens trained on so far, over all processes, without padding.
        best_tau: the largest exact acceptance length so far; None before the first evaluation.
        best_step: the update after which that was reached.
    """

    step: int = 0
    tokens: int = 0
    best_tau: float | None = None
    best_step: int | None = None

    def after_update(self, tokens: int) -> TrainState:
        """Counts one more update, on this many tokens."""
        return attrs.evolve(self, step=self.step + 1, tokens=self.tokens + tokens)

    def after_evaluation(self, tau: float) -> TrainState:
        """Takes in an evaluation; among equal acceptance lengths the first stays the best."""
        if self.best_tau is not None and tau <= self.best_tau:
            return self
        return attrs.evolve(self, best_tau=tau, best_step=self.step)


@attrs.frozen(kw_only=True, eq=False)
class BatchRow:
    """One packed row.

    Attributes:
        tensors: what `forward` receives, by name; shapes [1, S, ...].
        supervised: number of supervised tokens, `loss_mask.sum()`, known without a device synchronisation.
        index: its place in the global batch, the same for any number of processes.
        documents: ids of its conversations, for messages.
        layout: where its documents lie, which saves a forward a device synchronisation; None if not known.
    """

    tensors: Mapping[str, torch.Tensor]
    supervised: int
    index: int
    documents: tuple[str, ...] = ()
    layout: RowLayout | None = None


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """One process's share of the global batch of one update.

    Attributes:
        epoch: from 0.
        rows: built lazily, so that only one row is in memory at a time.
        num_rows: length of `rows`; equal on every process, or some would wait for ever in a collective.
        tokens: tokens of the global batch, without padding.
        supervised: supervised tokens of the global batch.
    """

    epoch: int
    rows: Iterable[BatchRow]
    num_rows: int
    tokens: int
    supervised: int


@attrs.frozen(kw_only=True)
class Job:
    """The work of one call of `train`.

    Attributes:
        total_steps: updates of the whole run, including those before a resume.
        seed: for the random numbers that a forward draws; see `rng.seed_row`.
        folder: where checkpoints are kept, and where a later call resumes from.
        fingerprint: of the train stage; a checkpoint with another fingerprint is refused.
        shard: what parameters and optimizer are sharded over: True, all processes; "node", those of each machine;
            False, nothing, so that each process keeps a copy.
    """

    schedule: ScheduleSection
    total_steps: int
    seed: int
    folder: Path
    fingerprint: str
    shard: bool | str = True


Batches = Callable[[int], Batch]
Evaluate = Callable[[], tuple[float, dict[str, float]]]
