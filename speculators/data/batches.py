"""Packed rows as a pure function of (seed, epoch, step, rank, world size): there is no loader state to save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import numpy as np
import torch

from speculators.data.encoded import Conversations, Encoded
from speculators.errors import DataError

Row = dict[str, torch.Tensor]
Align = Callable[[Row], Row]
States = tuple[torch.Tensor, torch.Tensor]
PADDING_TOKENS = 8


class StateSource(Protocol):
    """Where the verifier's states come from: the store, or the verifier itself."""

    def states(self, indices: list[int]) -> list[States]:
        """Returns hidden_states [n, A*H] and last [n, H] of each conversation."""


def pack(lengths: Sequence[int] | np.ndarray, *, row_tokens: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Returns the epoch's packed rows: first-fit over a seeded permutation, then the rows in seeded order.

    Args:
        lengths: [N], tokens of each document.
        row_tokens: the most that a row holds; documents are never split.
        seed: of the run.
        epoch: from 0.

    Returns:
        Document indices of each row. The rows are shuffled because first-fit leaves the emptier ones at the end.

    Raises:
        DataError: a document is longer than a row.
    """
    if len(lengths) and int(max(lengths)) > row_tokens:
        raise DataError(
            f"a conversation of {int(max(lengths))} tokens does not fit into a row of {row_tokens}",
            hint="raise schedule.row_tokens, or lower data.max_tokens",
        )
    generator = np.random.default_rng([seed, epoch])
    rows: list[list[int]] = [[] for _ in lengths]
    room = _Room(len(lengths), row_tokens)
    for index in generator.permutation(len(lengths)).tolist():
        rows[room.take(int(lengths[index]))].append(index)
    used = [tuple(row) for row in rows if row]
    return [used[place] for place in generator.permutation(len(used)).tolist()]


class _Room:
    """A tree of maxima over the rows' free tokens, which finds the first row with room in logarithmic time."""

    def __init__(self, rows: int, row_tokens: int) -> None:
        self.leaves = 1 << max(rows - 1, 0).bit_length()
        self.free = [row_tokens] * (2 * self.leaves)

    def take(self, tokens: int) -> int:
        node = 1
        while node < self.leaves:
            node = 2 * node if self.free[2 * node] >= tokens else 2 * node + 1
        row = node - self.leaves
        self.free[node] -= tokens
        while node > 1:
            node //= 2
            self.free[node] = max(self.free[2 * node], self.free[2 * node + 1])
        return row


def rows_of_step(
    rows: Sequence[tuple[int, ...]], *, step: int, rows_per_step: int, rank: int = 0, world_size: int = 1
) -> list[tuple[int, ...]]:
    """Returns the packed rows of one rank at one step of the epoch.

    The step's global batch is `rows_per_step` consecutive rows, fewer at the end of an epoch, whatever the world size;
    rank r takes every `world_size`-th of them from the r-th on. All ranks get the same number: a rank for which none is
    left gets an empty row `()`, which `build_row` makes padding, because every rank must take part in every collective.
    """
    chunk = rows[step * rows_per_step : (step + 1) * rows_per_step]
    own = list(chunk[rank::world_size])
    return own + [()] * (-(-len(chunk) // world_size) - len(own))


def unshifted(sample: Row) -> Row:
    """The alignment of an algorithm that shifts nothing."""
    return sample


def build_row(
    items: Sequence[tuple[Encoded, States]], *, widths: tuple[int, int], dtype: torch.dtype, align: Align = unshifted
) -> Row:
    """Returns what an algorithm's forward receives: documents side by side, no padding but for a row without any.

    Args:
        items: each document's tokens and states.
        widths: A*H and H, for a row without documents.
        dtype: compute type of the states.
        align: shifts a document's tokens and states, the algorithm's own.
    """
    if not items:
        return _padding(widths, dtype)
    samples = [align(_sample(encoded, *states, dtype)) for encoded, states in items]
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    row = {name: torch.cat([sample[name] for sample in samples])[None] for name in samples[0]}
    return {**row, "document_ids": torch.repeat_interleave(torch.arange(len(samples)), lengths)[None]}


def _sample(encoded: Encoded, hidden_states: torch.Tensor, last: torch.Tensor, dtype: torch.dtype) -> Row:
    return {
        "hidden_states": hidden_states.to(dtype),
        "verifier_last_hidden_states": last.to(dtype),
        "input_ids": torch.from_numpy(encoded.input_ids).long(),
        "loss_mask": torch.from_numpy(encoded.loss_mask),
        "position_ids": torch.arange(len(encoded.input_ids)),
    }


def _padding(widths: tuple[int, int], dtype: torch.dtype) -> Row:
    shape = (1, PADDING_TOKENS)
    return {
        "hidden_states": torch.zeros(*shape, widths[0], dtype=dtype),
        "verifier_last_hidden_states": torch.zeros(*shape, widths[1], dtype=dtype),
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "loss_mask": torch.zeros(shape, dtype=torch.bool),
        "position_ids": torch.arange(PADDING_TOKENS)[None],
        "document_ids": torch.full(shape, -1),
    }


@attrs.frozen(eq=False)
class Batches:
    """The rows of a run, by epoch and step.

    Attributes:
        conversations: tokens and masks.
        source: the verifier's states.
        widths: A*H and H.
        row_tokens: the most that a packed row holds.
        rows_per_step: packed rows of the global batch.
        seed: of the run.
        dtype: compute type of the states.
        align: the algorithm's.
        rank: of this process.
        world_size: processes.
    """

    conversations: Conversations
    source: StateSource
    widths: tuple[int, int]
    row_tokens: int
    rows_per_step: int
    seed: int
    dtype: torch.dtype
    align: Align = unshifted
    rank: int = 0
    world_size: int = 1
    _rows: dict[int, list[tuple[int, ...]]] = attrs.field(init=False, factory=dict, repr=False)
    _steps: dict[int, int] = attrs.field(init=False, factory=dict, repr=False)

    def __call__(self, epoch: int, step: int) -> list[Row]:
        """Returns this rank's rows of one step of the epoch."""
        rows = self.packed(epoch)
        place = {"rank": self.rank, "world_size": self.world_size}
        own = rows_of_step(rows, step=step, rows_per_step=self.rows_per_step, **place)
        return [self._build(row) for row in own]

    def _build(self, row: tuple[int, ...]) -> Row:
        indices = list(row)
        encoded = [self.conversations.row(index) for index in indices]
        states = self.source.states(indices) if indices else []
        items = list(zip(encoded, states, strict=True))
        return build_row(items, widths=self.widths, dtype=self.dtype, align=self.align)

    def packed(self, epoch: int) -> list[tuple[int, ...]]:
        """Returns all packed rows of an epoch."""
        rows = self._rows.get(epoch)
        if rows is None:
            # Two epochs are alive where one ends: this one's last step and the next one's first, built ahead.
            for old in list(self._rows)[:-1]:
                self._rows.pop(old, None)
            rows = pack(self.conversations.lengths, row_tokens=self.row_tokens, seed=self.seed, epoch=epoch)
            self._rows[epoch] = rows
        return rows

    def steps(self, epoch: int) -> int:
        """Returns the steps of an epoch; they differ a little because the packing does."""
        # Every look-up of a place asks for those of all epochs before it, whose rows are long gone.
        if epoch not in self._steps:
            self._steps[epoch] = -(-len(self.packed(epoch)) // self.rows_per_step)
        return self._steps[epoch]

    def documents(self, epoch: int, step: int) -> list[int]:
        """Returns the conversations of a step's global batch, for messages."""
        rows = rows_of_step(self.packed(epoch), step=step, rows_per_step=self.rows_per_step)
        return [index for row in rows for index in row]

    def supervised(self, epoch: int, step: int) -> int:
        """Returns the supervised tokens of a step's global batch: what the loss is divided by on every rank."""
        return int(self.conversations.supervised[self.documents(epoch, step)].sum())

    def tokens(self, epoch: int, step: int) -> int:
        """Returns the tokens of a step's global batch."""
        return int(self.conversations.lengths[self.documents(epoch, step)].sum())
