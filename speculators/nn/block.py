"""The attention of a block drafter: a prefix of context keys for each block, and the keys of the block itself.

The context is attended in pieces that yield their log-sum-exp, the block densely, and both are merged: the cost is
queries x context for the context (flash kernels where there are any) and queries x block for the rest, and no mask has
more entries than a piece.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

from speculators.nn.cache import KeysValues
from speculators.nn.flash import Piece, piecewise, piecewise_backward
from speculators.nn.layout import on_host

# Queries of one piece: fewer see fewer keys in vain, and three heads of a group give the CPU's kernel the 768 at once
# from which on it is fastest.
PIECE_QUERIES = 256


@attrs.frozen(eq=False)
class Blocks:
    """Blocks of queries that share a context, known on the host.

    Attributes:
        groups: [G, T] int64, the queries of each block in order, -1 where a block has fewer; each of the R queries
            stands in one place.
        ends: [R] int64, query i sees the context keys [start of its document, ends[i]); ascending in each document.
        documents: (first query, last query + 1, start) of each document: context keys before `start` are another's.
    """

    groups: torch.Tensor
    ends: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]

    @classmethod
    @on_host()
    def of(cls, anchors: torch.Tensor, sizes: torch.Tensor, ends: torch.Tensor, documents: Documents) -> Blocks:
        """Lays out one block a given place, in order.

        Args:
            anchors: [G] int64 on the host, ascending places of a row.
            sizes: [G] int64, queries of each block, at least 1.
            ends: [G] int64, where the context of each block ends.
            documents: (start, stop) of the row's documents.
        """
        first = sizes.cumsum(0) - sizes
        slots = torch.arange(int(sizes.max()) if len(sizes) else 0)
        groups = torch.where(slots < sizes[:, None], first[:, None] + slots, -1)
        spans = []
        for start, stop in documents:
            here = torch.nonzero((anchors >= start) & (anchors < stop))[:, 0]
            if len(here):
                low, high = int(here[0]), int(here[-1])
                spans.append((int(first[low]), int(first[high] + sizes[high]), start))
        return cls(groups, ends.repeat_interleave(sizes), tuple(spans))

    @on_host()
    def pieces(self, window: int | None) -> tuple[Piece, ...]:
        """Cuts the context's attention into dense blocks; queries without context are in none."""
        found = []
        for first, last, start in self.documents:
            begin = first + int((self.ends[first:last] <= start).sum())
            for q0 in range(begin, last, PIECE_QUERIES):
                q1 = min(q0 + PIECE_QUERIES, last)
                ends = self.ends[q0:q1]
                k0 = start if window is None else max(start, int(ends[0]) - window)
                found.append(Piece(q0, q1, k0, int(ends[-1]), causal=False, ends=ends, window=window))
        return tuple(found)


Documents = tuple[tuple[int, int], ...]


@attrs.frozen(eq=False)
class _Own:
    """The dense part: places of the queries in [G, T], on the device."""

    index: torch.Tensor
    there: torch.Tensor
    flat: torch.Tensor
    rows: torch.Tensor
    causal: bool

    @classmethod
    @on_host()
    def of(cls, blocks: Blocks, causal: bool, device: torch.device) -> _Own:
        flat = torch.nonzero(blocks.groups.flatten() >= 0)[:, 0]
        return cls(
            index=blocks.groups.clamp_min(0).to(device, non_blocking=True),
            there=(blocks.groups >= 0).to(device, non_blocking=True),
            flat=flat.to(device, non_blocking=True),
            rows=blocks.groups.flatten()[flat].to(device, non_blocking=True),
            causal=causal,
        )

    def spread(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """[R, heads, d] -> [G, kv_heads, heads // kv_heads, T, d]."""
        return x[self.index].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)

    def gather(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[G, kv_heads, group, T, ...] -> [R, heads, ...]."""
        flat = x.movedim(3, 1).flatten(2, 3).flatten(0, 1)[self.flat]
        return torch.empty_like(like, dtype=x.dtype).index_copy_(0, self.rows, flat)

    def scores(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """[G, kv_heads, group, T, T], -inf where a query does not see a key."""
        scores = q @ k.transpose(-1, -2) * scale
        hidden = ~self.there[:, None, None, None, :]
        if self.causal:
            slots = torch.arange(self.there.shape[1], device=q.device)
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
        queries, keys, values = (own.spread(x, kv_heads, lse.dtype) for x in (q, own_k, own_v))
        scores = own.scores(queries, keys, scale)
        own_lse = scores.logsumexp(-1)
        own_out = own.gather((scores - own_lse[..., None]).exp().nan_to_num() @ values, q)
        own_lse = own.gather(own_lse, lse)
        merged = torch.logaddexp(lse, own_lse)
        out = (out * (lse - merged).exp()[..., None] + own_out * (own_lse - merged).exp()[..., None]).to(q.dtype)
        ctx.save_for_backward(q, context_k, context_v, own_k, own_v, out, merged)
        ctx.pieces, ctx.own, ctx.scale = pieces, own, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, context_k, context_v, own_k, own_v, out, lse = ctx.saved_tensors
        own: _Own = ctx.own
        grad_q, grad_k, grad_v = piecewise_backward(grad_out, q, context_k, context_v, out, lse, ctx.pieces, ctx.scale)
        kv_heads = own_k.shape[1]
        queries, keys, values, grads, outs = (
            own.spread(x, kv_heads, lse.dtype) for x in (q, own_k, own_v, grad_out, out)
        )
        wide_lse = own.spread(lse[..., None], kv_heads, lse.dtype)
        there = own.there[:, None, None, :, None]
        probs = (own.scores(queries, keys, ctx.scale) - wide_lse).exp().masked_fill(~there, 0.0)
        delta = (grads * outs).sum(-1, keepdim=True)
        grad_scores = probs * (grads @ values.transpose(-1, -2) - delta) * ctx.scale
        grad_q = grad_q + own.gather(grad_scores @ keys, grad_q)
        shared = (grad_scores.transpose(-1, -2) @ queries, probs.transpose(-1, -2) @ grads)
        own_grads = [own.gather(x.sum(2, keepdim=True), own_k).to(own_k.dtype) for x in shared]
        return (
            *(None,) * 4,
            grad_q.to(q.dtype),
            grad_k.to(context_k.dtype),
            grad_v.to(context_v.dtype),
            *own_grads,
        )


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
        blocks: which query is of which block, and what of the context it sees.
        scale: factor of the scores.
        window: a query sees only the last `window` keys of its context; own keys are always seen.
        causal: a query sees the own keys up to itself; otherwise the whole block.

    Returns:
        [R, heads, d] in q's dtype. Differentiable in q, context and own.
    """
    if not len(q):
        return q * 0.0 + sum(x.sum() * 0.0 for x in (*context, *own))
    return _BlockAttention.apply(blocks, scale, window, causal, q, *context, *own)
