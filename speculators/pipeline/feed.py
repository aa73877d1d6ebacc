"""Packed rows for the training loop: which conversations, which states, for which update."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import attrs
import torch

from speculators.data.batches import Align, Batches, StateSource, rows_of_step
from speculators.data.encoded import Conversations
from speculators.data.prefetch import Prefetcher
from speculators.nn.layout import RowLayout
from speculators.pipeline.context import Context
from speculators.training.state import Batch, Row


@attrs.define(eq=False)
class Feed:
    """Gives each update's rows of this process; a pure function of the update's number."""

    context: Context
    prepared: Conversations
    source: StateSource
    align: Align

    @cached_property
    def batches(self) -> Batches:
        """The rows by epoch and step."""
        plan, world = self.context.plan, self.context.world
        width = plan.facts.hidden_size
        bf16 = plan.precision == "bf16"
        return Batches(
            conversations=self.prepared,
            source=self.source,
            widths=(len(plan.target_layer_ids) * width, width),
            row_tokens=plan.row_tokens,
            rows_per_step=plan.rows_per_step,
            seed=plan.recipe.seed,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            align=self.align,
            rank=world.rank,
            world_size=world.size,
        )

    @cached_property
    def ahead(self) -> Prefetcher:
        """The rows, built one step ahead."""
        return Prefetcher(self.batches, self._following)

    @cached_property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        schedule = self.context.recipe.schedule
        return schedule.max_steps or sum(self.batches.steps(epoch) for epoch in range(schedule.epochs))

    def place(self, step: int) -> tuple[int, int]:
        """Returns the epoch and the step within it of the update after `step` updates."""
        epoch = 0
        while step >= (steps := self.batches.steps(epoch)):
            step -= steps
            epoch += 1
        return epoch, step

    def _following(self, epoch: int, step: int) -> tuple[int, int] | None:
        after = (epoch, step + 1) if step + 1 < self.batches.steps(epoch) else (epoch + 1, 0)
        done = sum(self.batches.steps(before) for before in range(after[0])) + after[1]
        return after if done < self.total_steps else None

    def __call__(self, step: int) -> Batch:
        """Returns this process's part of the batch after `step` updates."""
        epoch, place = self.place(step)
        batches, world = self.batches, self.context.world
        members = rows_of_step(
            batches.packed(epoch),
            step=place,
            rows_per_step=batches.rows_per_step,
            rank=world.rank,
            world_size=world.size,
        )
        return Batch(
            epoch=epoch,
            rows=self._rows(epoch, place, members),
            num_rows=len(members),
            tokens=batches.tokens(epoch, place),
            supervised=batches.supervised(epoch, place),
        )

    def _rows(self, epoch: int, place: int, members: list[tuple[int, ...]]) -> Iterator[Row]:
        world = self.context.world
        for number, (tensors, documents) in enumerate(zip(self.ahead(epoch, place), members, strict=True)):
            yield Row(
                tensors=tensors,
                layout=RowLayout.of(tensors["document_ids"], tensors["loss_mask"]),
                supervised=int(self.prepared.supervised[list(documents)].sum()),
                index=number * world.size + world.rank,
                documents=tuple(self._names[index] for index in documents),
            )

    @cached_property
    def _names(self) -> list[str]:
        return self.prepared.ids()
