"""Builds packed rows as a pure function of (seed, epoch, step, rank, world size), so no loader state needs saving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, overload

import attrs
import numpy as np
import torch

from speculators.data.encoded import Conversations, Encoded
from speculators.errors import DataError

Row = dict[str, torch.Tensor]
Align = Callable[[Row], Row]
States = tuple[torch.Tensor, torch.Tensor]
PADDING_TOKENS = 8
# Documents whose lengths are Python integers at a time.
PACKED_AT_ONCE = 1 << 16


class StateSource(Protocol):
    """Provides the verifier's states, from the store, from the verifier itself or from servers."""

    def states(self, indices: list[int]) -> list[States]:
        """Returns hidden_states [n, A*H] and last [n, H] of each conversation, in the given order."""

    def follow(self, documents: Iterable[int]) -> None:
        """Takes in which conversations will be asked for, in order, before the first is; lazily, from any thread.

        Only sources that work ahead need it.
        """
        return

    def close(self) -> None:
        """Ends the work of a source that works ahead."""
        return


@attrs.frozen(eq=False)
class PackedRows(Sequence[tuple[int, ...]]):
    """The rows of an epoch, in two arrays: as Python objects, a million documents would take 100 MB in each process.

    Attributes:
        documents: [N] int64, the documents of all rows, row by row.
        ends: [R] int64, where each row ends in `documents`.
    """

    documents: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        """Gives the documents of one row, or of several."""
        rows = range(len(self))[place]
        return self._row(rows) if isinstance(rows, int) else [self._row(row) for row in rows]

    def _row(self, row: int) -> tuple[int, ...]:
        start = self.ends[row - 1] if row else 0
        return tuple(self.documents[start : self.ends[row]].tolist())


def pack(lengths: Sequence[int] | np.ndarray, *, row_tokens: int, seed: int, epoch: int) -> PackedRows:
    """Packs documents into rows: first-fit over a seeded permutation, then a seeded shuffle of the rows.

    Args:
        lengths: [N] tokens of each document.
        row_tokens: capacity of a row; documents are never split.
        seed: the run's seed.
        epoch: from 0.

    Returns:
        Document indices of each row. Without the shuffle an epoch would end with the emptiest rows, which first-fit
        leaves at the end.

    Raises:
        DataError: a document is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > row_tokens:
        raise DataError(
            f"a conversation of {lengths.max()} tokens does not fit into a row of {row_tokens} tokens",
            hint="raise schedule.row_tokens, or lower data.max_tokens",
        )
    # Both permutations come from this generator, in this order: changing that changes every batch of every run.
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    # Two rows of first-fit hold more than one row's capacity together: otherwise the second would not have been begun.
    room = _Room(2 * -(-int(lengths.sum()) // row_tokens) + 1, row_tokens)
    row_of = np.empty(len(lengths), np.int64)
    for start in range(0, len(order), PACKED_AT_ONCE):
        block = slice(start, start + PACKED_AT_ONCE)
        row_of[block] = [room.take(tokens) for tokens in lengths[order[block]].tolist()]
    shuffled = generator.permutation(int(row_of.max(initial=-1)) + 1)
    place_of = np.argsort(shuffled)[row_of]
    # Stable: a row keeps its documents in the order in which they came.
    return PackedRows(order[np.argsort(place_of, kind="stable")], np.cumsum(np.bincount(place_of)))


class _Room:
    """Finds the first row with enough room in logarithmic time: a binary tree of maxima over the rows' free tokens."""

    def __init__(self, rows: int, row_tokens: int) -> None:
        self.leaves = 1 << max(rows - 1, 0).bit_length()
        self.free = [row_tokens] * (2 * self.leaves)  # node 1 is the root, the leaves are at [leaves, 2 * leaves)

    def take(self, tokens: int) -> int:
        """Books `tokens` in the first row with room for them, and returns that row."""
        free, node = self.free, 1
        while node < self.leaves:
            node *= 2
            if free[node] < tokens:
                node += 1
        row = node - self.leaves
        free[node] -= tokens
        while node > 1:
            largest = max(free[node], free[node ^ 1])
            node //= 2
            if free[node] == largest:
                break
            free[node] = largest
        return row


def rows_of_step(
    rows: Sequence[tuple[int, ...]], *, step: int, rows_per_step: int, rank: int = 0, world_size: int = 1
) -> list[tuple[int, ...]]:
    """Selects the packed rows of one rank at one step of the epoch.

    The global batch of a step is `rows_per_step` consecutive rows, fewer at the end of an epoch, whatever the world
    size. Rank r takes every `world_size`-th of them, starting with the r-th. All ranks get the same number of rows,
    because every rank must take part in every collective: where none is left, a rank gets an empty row `()`, for which
    `build_row` makes padding.
    """
    chunk = rows[step * rows_per_step : (step + 1) * rows_per_step]
    own = list(chunk[rank::world_size])
    return own + [()] * (-(-len(chunk) // world_size) - len(own))


def unshifted(sample: Row) -> Row:
    """The alignment of algorithms that shift nothing."""
    return sample


def build_row(
    items: Sequence[tuple[Encoded, States]], *, widths: tuple[int, int], dtype: torch.dtype, align: Align = unshifted
) -> Row:
    """Builds the tensors that an algorithm's forward receives, with documents side by side and without padding.

    Args:
        items: tokens and states of each document; an empty row becomes padding.
        widths: A*H and H, needed for an empty row.
        dtype: compute type of the states.
        align: the algorithm's shift of a document's tokens and states.
    """
    if not items:
        return _padding(widths, dtype)
    samples = [align(_sample(encoded, *states, dtype)) for encoded, states in items]
    # Lengths after the alignment, which may drop places.
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    # [1, S, ...] each
    row = {name: torch.cat([sample[name] for sample in samples])[None] for name in samples[0]}
    return {**row, "document_ids": torch.repeat_interleave(torch.arange(len(samples)), lengths)[None]}


def _sample(encoded: Encoded, hidden_states: torch.Tensor, last: torch.Tensor, dtype: torch.dtype) -> Row:
    return {
        "hidden_states": hidden_states.to(dtype),  # [n, A*H]
        "verifier_last_hidden_states": last.to(dtype),  # [n, H]
        "input_ids": torch.from_numpy(encoded.input_ids).long(),  # [n]
        "loss_mask": torch.from_numpy(encoded.loss_mask),  # [n] bool
        "position_ids": torch.arange(len(encoded.input_ids)),  # [n]
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
    """Builds the rows of a run by epoch and step.

    Attributes:
        conversations: tokens and masks.
        source: the verifier's states.
        widths: A*H and H.
        row_tokens: capacity of a packed row.
        rows_per_step: packed rows of the global batch.
        seed: the run's seed.
        dtype: compute type of the states.
        align: the algorithm's alignment.
        rank: number of this process.
        world_size: number of processes.
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
    _rows: dict[int, PackedRows] = attrs.field(init=False, factory=dict, repr=False)
    _steps: dict[int, int] = attrs.field(init=False, factory=dict, repr=False)

    def __call__(self, epoch: int, step: int) -> list[Row]:
        """Builds this rank's rows of one step of the epoch."""
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

    def packed(self, epoch: int) -> PackedRows:
        """Packs an epoch, keeping the rows of the last two epochs."""
        rows = self._rows.get(epoch)
        if rows is None:
            # Where an epoch ends, two are needed: its last step, and the first of the next, which is built ahead.
            for old in list(self._rows)[:-1]:
                self._rows.pop(old, None)
            rows = pack(self.conversations.lengths, row_tokens=self.row_tokens, seed=self.seed, epoch=epoch)
            self._rows[epoch] = rows
        return rows

    def steps(self, epoch: int) -> int:
        """Counts the steps of an epoch; epochs differ a little because their packing does."""
        # Locating a step asks for the steps of all earlier epochs, whose rows are long dropped.
        if epoch not in self._steps:
            self._steps[epoch] = -(-len(self.packed(epoch)) // self.rows_per_step)
        return self._steps[epoch]

    def documents(self, epoch: int, step: int) -> list[int]:
        """Lists the conversations of a step's global batch."""
        rows = rows_of_step(self.packed(epoch), step=step, rows_per_step=self.rows_per_step)
        return [index for row in rows for index in row]

    def supervised(self, epoch: int, step: int) -> int:
        """Counts the supervised tokens of a step's global batch, by which every rank divides its loss."""
        return int(self.conversations.supervised[self.documents(epoch, step)].sum())

    def tokens(self, epoch: int, step: int) -> int:
        """Counts the tokens of a step's global batch."""
        return int(self.conversations.lengths[self.documents(epoch, step)].sum())
