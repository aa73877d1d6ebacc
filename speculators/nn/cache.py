"""Keeps the keys and values of verified rows from round to round while one sequence is decoded."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from speculators.nn.attention import unrolled_attention
from speculators.nn.layout import Segment

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Takes a layer's index and this call's queries, keys and values; attends over these and over what has been cached.
AttendAt = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@attrs.define(eq=False)
class PrefixCache:
    """A drafter's keys and values of one sequence.

    Attributes:
        length: number of rows.
        layers: keys and values of each layer, [length, kv_heads, d] each.
    """

    length: int = 0
    layers: list[KeysValues] = attrs.field(factory=list)

    def append(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """Adds a layer's keys and values of the newest rows and returns those of all rows; layers come in order."""
        if index == len(self.layers):
            self.layers.append((keys, values))
        else:
            old_keys, old_values = self.layers[index]
            self.layers[index] = (torch.cat((old_keys, keys)), torch.cat((old_values, values)))
        return self.layers[index]

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Makes room for the rows of `tokens` [m] and returns their positions [m]."""
        start, self.length = self.length, self.length + len(tokens)
        return torch.arange(start, self.length, device=tokens.device)

    def attend(self, *, scale: float, window: int | None) -> AttendAt:
        """Makes the causal attention of the newest rows, which adds their keys and values to the cache.

        Args:
            scale: factor of the scores.
            window: sliding window, or None.
        """

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            segments = (Segment(0, self.length - len(q), self.length),)
            return unrolled_attention(q, self.append(index, k, v), [], segments, scale=scale, window=window)

        return attend
