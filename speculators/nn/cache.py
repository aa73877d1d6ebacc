"""The keys and values of verified rows, kept from round to round while one sequence is decoded."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from speculators.nn.attention import unrolled_attention
from speculators.nn.layout import Segment

KeysValues = tuple[torch.Tensor, torch.Tensor]
# The attention of layer `index` over this call's queries, keys and values, and whatever has been cached.
AttendAt = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@attrs.define(eq=False)
class PrefixCache:
    """What a drafter keeps of one sequence.

    Attributes:
        length: rows taken in.
        layers: keys and values of each layer, [length, kv_heads, d] each.
    """

    length: int = 0
    layers: list[KeysValues] = attrs.field(factory=list)

    def append(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """Files a layer's keys and values of the newest rows; returns those of all rows. Layers come in order."""
        if index == len(self.layers):
            self.layers.append((keys, values))
        else:
            held = self.layers[index]
            self.layers[index] = (torch.cat((held[0], keys)), torch.cat((held[1], values)))
        return self.layers[index]

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Counts the rows of `tokens` [m] in; returns their positions [m]."""
        start, self.length = self.length, self.length + len(tokens)
        return torch.arange(start, self.length, device=tokens.device)

    def attend(self, *, scale: float, window: int | None) -> AttendAt:
        """Returns the causal attention of the newest rows, which files their keys and values.

        Args:
            scale: of the scores.
            window: sliding window, or None.
        """

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            segments = (Segment(0, self.length - len(q), self.length),)
            return unrolled_attention(q, self.append(index, k, v), [], segments, scale=scale, window=window)

        return attend
