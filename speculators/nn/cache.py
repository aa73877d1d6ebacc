"""Keeps the keys and values of a decoded sequence from round to round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch
from torch.nn.functional import scaled_dot_product_attention

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Takes a layer's index and this call's queries, keys and values; attends over these and over what has been cached.
AttendAt = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Queries at once from which keys are repeated for each query head: a kernel that knows the mask to be causal then skips
# what lies above the diagonal.
MANY_QUERIES = 64
_FIRST_CAPACITY = 256


@attrs.define(eq=False)
class KeyBuffer:
    """Keys and values of one sequence, layer by layer, written in place.

    Attributes:
        length: verified tokens; a drafter counts them here, and writes the keys of its drafts behind them.
    """

    length: int = 0
    _layers: list[KeysValues] = attrs.field(factory=list)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Counts `tokens` [m] as verified and returns their positions [m]."""
        start, self.length = self.length, self.length + len(tokens)
        return torch.arange(start, self.length, device=tokens.device)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Writes keys and values [S, kv_heads, d] of a layer at places start, start + 1, ...; layers come in order."""
        stop = start + len(k)
        if layer == len(self._layers):
            self._layers.append((_room(k, 0), _room(v, 0)))
        keys, values = self._layers[layer]
        if keys.shape[1] < stop:
            # Twice as much as needed, so that few steps copy.
            keys, values = (_moved(old, _room(new, 2 * stop)) for old, new in ((keys, k), (values, v)))
            self._layers[layer] = keys, values
        keys[:, start:stop] = k.transpose(0, 1)
        values[:, start:stop] = v.transpose(0, 1)

    def read(self, layer: int) -> KeysValues:
        """Gives a layer's keys and values of the verified tokens, [length, kv_heads, d] each."""
        keys, values = self._layers[layer]
        return keys[:, : self.length].transpose(0, 1), values[:, : self.length].transpose(0, 1)

    def pick(self, start: int, rows: Sequence[int]) -> None:
        """Moves the keys at places start + rows to start, start + 1, ..."""
        for tensor in (tensor for pair in self._layers for tensor in pair):
            index = start + torch.tensor(rows, dtype=torch.int64, device=tensor.device)
            tensor[:, start : start + len(rows)] = tensor.index_select(1, index)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        start: int,
        scale: float,
        first: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes keys and values at places start, start + 1, ... and attends over all keys from `first` on.

        Args:
            q: [R, heads, d], of the last R of the S new tokens.
            k: [S, kv_heads, d], likewise v.
            start: place of the first new token.
            scale: factor of the scores.
            first: first place that is seen.
            mask: from `widened`; None: each query sees the keys up to its own.

        Returns:
            [R, heads, d].
        """
        self.write(layer, k, v, start)
        rows, heads, size = q.shape
        kv_heads, stop = k.shape[1], start + len(k)
        group = heads // kv_heads
        keys, values = (tensor[None, :, first:stop] for tensor in self._layers[layer])
        if mask is None and rows >= MANY_QUERIES and rows == stop - first:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
            out = scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, is_causal=True, scale=scale)
            return out[0].transpose(0, 1)
        if mask is None and rows > 1:
            mask = widened(causal(rows, stop - first, q), group)
        # The query heads of one kv head are laid end to end as rows, so that no key is repeated.
        q = q.reshape(rows, kv_heads, group, size).transpose(0, 1).reshape(1, kv_heads, rows * group, size)
        out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        return out.view(kv_heads, rows, group, size).transpose(0, 1).reshape(rows, heads, size)

    def attend_newest(self, *, scale: float, window: int | None) -> AttendAt:
        """Makes the causal attention of the tokens that `extend` counted last, which adds their keys and values.

        Args:
            scale: factor of the scores.
            window: a query sees only the last `window` keys up to its own; None for all.
        """

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            mask = None
            if window is not None:
                mask = widened(causal(len(q), self.length, q, window), q.shape[1] // k.shape[1])
            return self.attend(layer, q, k, v, start=self.length - len(k), scale=scale, mask=mask)

        return attend

    def attend_draft(self, depth: int, *, scale: float, window: int | None) -> AttendAt:
        """Makes the attention of the draft of `depth`, from 1, over verified keys and its own round's earlier drafts.

        Args:
            scale: factor of the scores.
            window: the last `window` verified keys are seen; None for all. Drafts are always seen.
        """
        first = 0 if window is None else max(0, self.length - window)
        return partial(self.attend, start=self.length + depth - 1, scale=scale, first=first)

    def attend_tree(self, sees: torch.Tensor, *, scale: float, window: int | None) -> AttendAt:
        """Makes the attention of R nodes of a drafted tree over verified keys and the nodes of the levels so far.

        Args:
            sees: [R, N] bool, which of the N nodes so far each node sees; the R themselves are the last.
            scale: factor of the scores.
            window: the last `window` verified keys are seen; None for all. Nodes are seen whatever it is.
        """
        first = 0 if window is None else max(0, self.length - window)
        start = self.length + sees.shape[1] - len(sees)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            mask = q.new_zeros(len(q), self.length - first + sees.shape[1])
            mask[:, self.length - first :].masked_fill_(~sees, float("-inf"))
            mask = widened(mask, q.shape[1] // k.shape[1])
            return self.attend(layer, q, k, v, start=start, scale=scale, first=first, mask=mask)

        return attend


def _room(like: torch.Tensor, tokens: int) -> torch.Tensor:
    return like.new_empty(like.shape[1], max(tokens, _FIRST_CAPACITY), like.shape[2])


def _moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    new[:, : old.shape[1]] = old
    return new


def causal(rows: int, keys: int, like: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Makes the additive mask [rows, keys] of the last `rows` of `keys` tokens, in dtype and on device of `like`."""
    mask = like.new_full((rows, keys), float("-inf")).triu_(keys - rows + 1)
    if window is not None:
        # A query at place i sees the keys j > i - window.
        mask += like.new_full((rows, keys), float("-inf")).tril_(keys - rows - window)
    return mask


def widened(mask: torch.Tensor, group: int) -> torch.Tensor:
    """Repeats each row of an additive mask for the `group` query heads of a kv head, as `KeyBuffer.attend` reads it."""
    return mask.repeat_interleave(group, 0)
