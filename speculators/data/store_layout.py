"""The layout of a hidden-state store: where each conversation's states lie, known before anything is captured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import torch

from speculators.chunks import CHUNKS
from speculators.data.state_types import DTYPES, Part, from_stored, stored_parts, to_stored
from speculators.files.folders import FORMAT

LAYOUT = "layout.json"
# Larger stores have larger shards instead of more of them, up to LARGEST_SHARD: capture holds three in memory.
MOST_SHARDS = 4096
LARGEST_SHARD = 1 << 29  # bytes


def plan_shards(lengths: Sequence[int] | np.ndarray, shard_tokens: int) -> tuple[np.ndarray, ...]:
    """Distributes conversations over shards, in the order of their length.

    A pure function: a shard that is captured again after a kill or damage has the same conversations in the same order,
    and is computed in the same batches. Sorting by length puts conversations together that need no padding in a batch.

    Returns:
        [n] int64 for each shard: views of one array.
    """
    lengths = _int64(lengths)
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    cuts = [0]
    while cuts[-1] < len(order):
        full = shard_tokens + (ends[cuts[-1] - 1] if cuts[-1] else 0)
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, full, side="right"))))
    return tuple(order[start:end] for start, end in pairwise(cuts))


def shard_tokens_for(tokens: int, row_bytes: int, *, at_least: int) -> int:
    """Chooses the tokens per shard: more than `at_least` where the store would otherwise have too many files.

    Args:
        tokens: of the whole store.
        row_bytes: stored per token.
        at_least: `shard_tokens` of the device's `CHUNKS`.
    """
    return max(at_least, min(-(-tokens // MOST_SHARDS), LARGEST_SHARD // row_bytes))


def _int64(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(lengths, np.int64)


@attrs.frozen(eq=False)
class StoreLayout:
    """The layout of a store, known before anything is captured.

    Attributes:
        key: fingerprint of the inputs of the states; a store with another key is never read.
        lengths: [N] int64, number of tokens of each conversation.
        aux_width: A*H, columns of the auxiliary states.
        width: H, columns of the last layer's state.
        dtype: "bfloat16", "float16", "float32" or "fp8".
        ends_in_last: whether the last H auxiliary columns are the last layer's state, which is then stored once.
        shard_tokens: tokens per shard; a longer conversation gets a shard of its own.
        shards: [n] int64 for each shard, its conversations in their order in the file.
        places: [N, 2] int64, each conversation's shard and first row in it.
        parts: the tensors of each shard.
    """

    key: str
    lengths: np.ndarray = attrs.field(converter=_int64, repr=False)
    aux_width: int
    width: int
    dtype: str = attrs.field(validator=attrs.validators.in_(DTYPES))
    shard_tokens: int = CHUNKS["cpu"].shard_tokens
    ends_in_last: bool = False
    shards: tuple[np.ndarray, ...] = attrs.field(init=False, repr=False)
    places: np.ndarray = attrs.field(init=False, repr=False)
    parts: tuple[Part, ...] = attrs.field(init=False, repr=False)

    @shards.default
    def _shards(self) -> tuple[np.ndarray, ...]:
        return plan_shards(self.lengths, self.shard_tokens)

    @places.default
    def _places(self) -> np.ndarray:
        places = np.zeros((len(self.lengths), 2), np.int64)
        for number, members in enumerate(self.shards):
            lengths = self.lengths[members]
            places[members, 0] = number
            places[members, 1] = np.cumsum(lengths) - lengths
        return places

    @parts.default
    def _parts(self) -> tuple[Part, ...]:
        stored = self.aux_width - self.width * self.ends_in_last
        return stored_parts(aux_width=stored, width=self.width, dtype=self.dtype)

    def rows(self, shard: int) -> int:
        """Counts the tokens of a shard: rows of its tensors."""
        return int(self.lengths[self.shards[shard]].sum())

    def bytes_for(self, tokens: int) -> int:
        """Computes the size on disk of the states of this many tokens."""
        return tokens * sum(part.row_bytes for part in self.parts)

    def encode(self, hidden_states: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Converts states [n, A*H] and [n, H] to the parts that are stored, on their device."""
        return to_stored(hidden_states[:, : self.parts[0].columns], last, self.dtype)

    def decode(self, parts: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Converts stored parts to hidden_states [n, A*H] and last [n, H]; 8 bits are decoded on `device`."""
        states, last = from_stored(parts, device)
        return torch.cat([states, last], 1) if self.ends_in_last else states, last

    def to_json(self) -> dict[str, Any]:
        """Writes the content of the store's `layout.json`."""
        plain = attrs.asdict(self, filter=lambda field, _: field.init)
        if not self.ends_in_last:
            # As earlier versions wrote it, so that an interrupted capture continues.
            del plain["ends_in_last"]
        return {"format": FORMAT, **plain, "lengths": self.lengths.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StoreLayout:
        """Reads what `to_json` wrote."""
        return cls(**{field.name: values[field.name] for field in attrs.fields(cls) if field.name in values})


def store_bytes(tokens: int, *, aux_width: int, width: int, dtype: str) -> int:
    """Computes the size on disk of the states of this many tokens, for plans, which have no layout yet."""
    return tokens * sum(part.row_bytes for part in stored_parts(aux_width=aux_width, width=width, dtype=dtype))
