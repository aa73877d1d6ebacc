"""The attention of a block drafter: a prefix of context keys for each block, and the keys of the block itself.

On a GPU with flash kernels, context and blocks are laid end to end and attended in one kernel (flex.py).

Elsewhere, and in a single round, the context is attended in pieces that yield their log-sum-exp, the block densely, and
the two are merged as in attention.py. That costs queries x context for the context and queries x block for the rest. No
mask has more entries than one piece.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import attrs
import torch
from torch.nn.attention.flex_attention import BlockMask

from speculators.nn import flex
from speculators.nn.cache import KeysValues
from speculators.nn.flash import Piece, has_cuda_flash, piecewise, piecewise_backward
from speculators.nn.layout import on_host

# Queries per piece. Fewer would compute fewer masked scores; but the CPU's kernel is fastest from 768 queries at once,
# which 256 give it where three query heads share a kv head.
PIECE_QUERIES = 256


@attrs.frozen(eq=False)
class Blocks:
    """Blocks of queries that share a context, known on the host.

    Attributes:
        groups: [G, T] int64, the queries of each block in order, padded with -1; each of the R queries appears once.
        ends: [R] int64, query i sees the context keys [start of its document, ends[i]); ascending in each document.
        documents: (first query, last query + 1, start) of each document with queries; context keys before `start`
            belong to another document.
    """

    groups: torch.Tensor
    ends: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]

    @classmethod
    @on_host()
    def of(cls, anchors: torch.Tensor, sizes: torch.Tensor, ends: torch.Tensor, documents: Documents) -> Blocks:
        """Lays out one block per anchor, in order.

        Args:
            anchors: [G] int64 on the host, ascending places of a row.
            sizes: [G] int64, queries of each block, at least 1.
            ends: [G] int64, where the context of each block ends.
            documents: (start, stop) of the row's documents.
        """
        # Queries are numbered block after block; a block's first query is the sum of the sizes before it.
        first = sizes.cumsum(0) - sizes
        slots = torch.arange(int(sizes.max()) if len(sizes) else 0)
        groups = torch.where(slots < sizes[:, None], first[:, None] + slots, -1)
        spans = []
        for start, stop in documents:
            inside = torch.nonzero((anchors >= start) & (anchors < stop))[:, 0]
            if len(inside):
                low, high = int(inside[0]), int(inside[-1])
                spans.append((int(first[low]), int(first[high] + sizes[high]), start))
        return cls(groups, ends.repeat_interleave(sizes), tuple(spans))

    @on_host()
    def pieces(self, window: int | None) -> tuple[Piece, ...]:
        """Cuts the context's attention into dense pieces; queries without context are in none."""
        pieces = []
        for first, last, start in self.documents:
            # A kernel's softmax over no key at all would be nan.
            begin = first + int((self.ends[first:last] <= start).sum())
            for q0 in range(begin, last, PIECE_QUERIES):
                q1 = min(q0 + PIECE_QUERIES, last)
                ends = self.ends[q0:q1]
                # No query of the piece sees further back than the first one's window.
                k0 = start if window is None else max(start, int(ends[0]) - window)
                pieces.append(Piece(q0, q1, k0, int(ends[-1]), causal=False, ends=ends, window=window))
        return tuple(pieces)

    @on_host()
    def runs(self, num_context: int, window: int | None, *, causal: bool) -> torch.Tensor:
        """Finds the keys that each query sees where the block's own keys follow the context's: see `flex.run_mask`."""
        starts = torch.zeros_like(self.ends)
        for first, last, start in self.documents:
            starts[first:last] = start
        if window is not None:
            starts = torch.maximum(starts, self.ends - window)
        sizes = (self.groups >= 0).sum(1)
        first_own = self.groups[:, 0].repeat_interleave(sizes)
        last_own = torch.arange(len(self.ends)) if causal else first_own + sizes.repeat_interleave(sizes) - 1
        return torch.stack((starts, self.ends, num_context + first_own, num_context + last_own + 1))


Documents = tuple[tuple[int, int], ...]


@attrs.frozen(eq=False)
class _Own:
    """The dense part: where the R queries lie in [G, T], on the device.

    Attributes:
        index: [G, T] int64, the query at each place; 0 where there is none.
        filled: [G, T] bool, whether there is one.
        flat: [R] int64, the filled places of the flattened [G * T].
        rows: [R] int64, the query at each of them.
        causal: a query sees the block's keys up to its own.
    """

    index: torch.Tensor
    filled: torch.Tensor
    flat: torch.Tensor
    rows: torch.Tensor
    causal: bool

    @classmethod
    @on_host()
    def of(cls, blocks: Blocks, causal: bool, device: torch.device) -> _Own:
        flat = torch.nonzero(blocks.groups.flatten() >= 0)[:, 0]
        return cls(
            index=blocks.groups.clamp_min(0).to(device, non_blocking=True),
            filled=(blocks.groups >= 0).to(device, non_blocking=True),
            flat=flat.to(device, non_blocking=True),
            rows=blocks.groups.flatten()[flat].to(device, non_blocking=True),
            causal=causal,
        )

    def spread(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """Lays queries out by block: [R, heads, d] -> [G, kv_heads, heads // kv_heads, T, d]."""
        return x[self.index].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)

    def gather(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Undoes `spread`: [G, kv_heads, group, T, ...] -> [R, heads, ...]."""
        flat = x.movedim(3, 1).flatten(2, 3).flatten(0, 1)[self.flat]
        return torch.empty_like(like, dtype=x.dtype).index_copy_(0, self.rows, flat)

    def scores(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores queries against the keys of their block: [G, kv_heads, group, T, T], -inf where one is not seen."""
        scores = q @ k.transpose(-1, -2) * scale
        hidden = ~self.filled[:, None, None, None, :]
        if self.causal:
            slots = torch.arange(self.filled.shape[1], device=q.device)
            hidden = hidden | (slots[None, :] > slots[:, None])
        return scores.masked_fill(hidden, float("-inf"))


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        blocks: Blocks,
        scale: float,
        window: int | None,
        causal: bool,
        q: torch.Tensor,
        context_k: torch.Tensor,
        context_v: torch.Tensor,
        own_k: torch.Tensor,
        own_v: torch.Tensor,
    ) -> torch.Tensor:
        pieces, own = blocks.pieces(window), _Own.of(blocks, causal, q.device)
        out, lse = piecewise(q, context_k, context_v, pieces, scale)
        kv_heads = own_k.shape[1]
        # [G, kv_heads, group, T, d]
        queries, keys, values = (own.spread(x, kv_heads, lse.dtype) for x in (q, own_k, own_v))
        scores = own.scores(queries, keys, scale)  # [G, kv_heads, group, T, T]
        own_lse = scores.logsumexp(-1)
        own_out = own.gather((scores - own_lse[..., None]).exp().nan_to_num() @ values, q)
        own_lse = own.gather(own_lse, lse)  # [R, heads]
        # A block without context has lse -inf and out 0: the merge then is the own part.
        merged = torch.logaddexp(lse, own_lse)
        out = (out * (lse - merged).exp()[..., None] + own_out * (own_lse - merged).exp()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, context_k, context_v, own_k, own_v, out, merged)
        ctx.pieces, ctx.own, ctx.scale = pieces, own, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, context_k, context_v, own_k, own_v, out, lse = ctx.saved_tensors
        own: _Own = ctx.own
        # With the merged output and log-sum-exp each part's gradients are exact; see attention.py.
        grad_q, grad_k, grad_v = piecewise_backward(grad_out, q, context_k, context_v, out, lse, ctx.pieces, ctx.scale)
        kv_heads = own_k.shape[1]
        queries, keys, values, grads, outs = (
            own.spread(x, kv_heads, lse.dtype) for x in (q, own_k, own_v, grad_out, out)
        )
        wide_lse = own.spread(lse[..., None], kv_heads, lse.dtype)
        filled = own.filled[:, None, None, :, None]
        probs = (own.scores(queries, keys, ctx.scale) - wide_lse).exp().masked_fill(~filled, 0.0)
        # dO . O over the merged output, as in attention.py.
        delta = (grads * outs).sum(-1, keepdim=True)
        grad_scores = probs * (grads @ values.transpose(-1, -2) - delta) * ctx.scale
        grad_q = grad_q + own.gather(grad_scores @ keys, grad_q)
        # Keys and values of a kv head add up over its group of query heads.
        shared = (grad_scores.transpose(-1, -2) @ queries, probs.transpose(-1, -2) @ grads)
        own_grads = [own.gather(x.sum(2, keepdim=True), own_k).to(own_k.dtype) for x in shared]
        return (
            *(None,) * 4,
            grad_q.to(q.dtype),
            grad_k.to(context_k.dtype),
            grad_v.to(context_v.dtype),
            *own_grads,
        )


def _has_one_kernel(q: torch.Tensor) -> bool:
    """Whether one kernel attends these queries; a round's few fill no tile, and would be compiled for by themselves."""
    return has_cuda_flash(q) and q.shape[-1] >= flex.SMALLEST_HEAD and len(q) > flex.TILE


@lru_cache(maxsize=4)
def _mask(blocks: Blocks, num_context: int, window: int | None, causal: bool, device: torch.device) -> BlockMask:
    """Makes the mask of one row's blocks; cached for its other layers."""
    runs = blocks.runs(num_context, window, causal=causal).to(device, non_blocking=True)
    return flex.run_mask(runs, num_context + len(blocks.ends))


def block_attention(
    q: torch.Tensor,
    context: KeysValues,
    own: KeysValues,
    blocks: Blocks,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attends the queries of blocks to the context before their block and to the block itself.

    Args:
        q: [R, heads, d].
        context: keys and values, [S, kv_heads, d] each.
        own: keys and values of the queries' own rows, [R, kv_heads, d] each.
        blocks: the block of each query, and how much of the context it sees.
        scale: factor of the scores.
        window: a query sees only the last `window` keys of its context; own keys are always seen.
        causal: a query sees the own keys up to itself instead of the whole block.

    Returns:
        [R, heads, d] in q's dtype. Differentiable in q, context and own.
    """
    if not len(q):
        return q * 0.0 + sum(x.sum() * 0.0 for x in (*context, *own))
    if _has_one_kernel(q):
        keys, values = (torch.cat(pair) for pair in zip(context, own, strict=True))
        mask = _mask(blocks, len(context[0]), window, causal, q.device)
        return flex.masked_attention(q, keys, values, mask, scale)
    return _BlockAttention.apply(blocks, scale, window, causal, q, *context, *own)
