"""The attention of an unrolled autoregressive drafter: a causal prefix, plus the query's own keys of earlier depths.

At depth d the query of row i sees the depth-0 keys j <= i of its document and one key of each depth 1..d, of its own
row. So the prefix is an ordinary causal attention, the own keys are d scalar products per query, and the two are merged
by their log-sum-exp: S^2 + d*S scores instead of a dense S x (d+1)S mask.

With scores s, L = log sum exp(s) over the prefix and s_j of the d own keys:

    L' = logaddexp(L, logsumexp_j s_j),    O' = exp(L - L') O + sum_j exp(s_j - L') v_j.

Backward, the prefix's kernel receives the merged O' and L' (as in ring attention), which makes its gradients exact. The
own keys are done by hand: P_j = exp(s_j - L'), dS_j = P_j (dO . v_j - dO . O'), dv_j = P_j dO, dk_j = scale dS_j q.
"""

from __future__ import annotations

from typing import Any

import torch

from speculators.nn.flash import causal_attention, causal_attention_backward
from speculators.nn.layout import Segment


class _UnrolledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: tuple[Segment, ...],
        scale: float,
        window: int | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        # own is k_1, v_1, k_2, v_2, ...: autograd only tracks tensors that are arguments themselves.
        out, lse = causal_attention(q, k, v, segments, scale, window)
        if own:
            out, lse = _merge_own(out, lse, q, own, scale)
        ctx.save_for_backward(q, k, v, out, lse, *own)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *own = ctx.saved_tensors
        grads = causal_attention_backward(grad_out, q, k, v, out, lse, ctx.segments, ctx.scale, ctx.window)
        grad_q, grad_k, grad_v = grads
        own_grads: list[torch.Tensor] = []
        if own:
            # [R, kv_heads, group, d]: the query heads of a group share their key.
            wide_q, wide_grad = (_grouped(x, own[0].shape[1], lse.dtype) for x in (q, grad_out))
            wide_lse = lse.unflatten(1, (own[0].shape[1], -1))  # [R, kv_heads, group]
            # dO . O', which is sum_j P_j (dO . v_j) over all keys, prefix and own.
            delta = (wide_grad * _grouped(out, own[0].shape[1], lse.dtype)).sum(-1)
            grad_own_q = torch.zeros_like(wide_q)
            for key, value in zip(own[::2], own[1::2], strict=True):
                wide_key, wide_value = key[:, :, None].to(lse.dtype), value[:, :, None].to(lse.dtype)
                # Scores are recomputed: keeping them would cost d * R * heads for one product each.
                prob = ((wide_q * wide_key).sum(-1) * ctx.scale - wide_lse).exp()
                grad_score = prob * ((wide_grad * wide_value).sum(-1) - delta) * ctx.scale
                grad_own_q += grad_score[..., None] * wide_key
                own_grads.append((grad_score[..., None] * wide_q).sum(2).to(key.dtype))
                own_grads.append((prob[..., None] * wide_grad).sum(2).to(value.dtype))
            grad_q = grad_q + grad_own_q.flatten(1, 2)
        return (None, None, None, grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), *own_grads)


def _grouped(x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups query heads by their kv head: [R, heads, d] -> [R, kv_heads, heads // kv_heads, d] in `dtype`."""
    return x.unflatten(1, (kv_heads, -1)).to(dtype)


def _merge_own(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, own: tuple[torch.Tensor, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the own keys to the prefix's softmax: output [R, heads, d] and log-sum-exp [R, heads] over both."""
    kv_heads = own[0].shape[1]
    wide_q = _grouped(q, kv_heads, lse.dtype)
    scores = torch.stack([(wide_q * key[:, :, None]).sum(-1) * scale for key in own[::2]])  # [d, R, kv_heads, group]
    prefix = lse.unflatten(1, (kv_heads, -1))
    merged = torch.logaddexp(prefix, scores.logsumexp(0))
    total = _grouped(out, kv_heads, lse.dtype) * (prefix - merged).exp()[..., None]
    for score, value in zip(scores, own[1::2], strict=True):
        total += (score - merged).exp()[..., None] * value[:, :, None]
    return total.flatten(1, 2).to(out.dtype), merged.flatten(1)


def unrolled_attention(
    q: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    own: list[tuple[torch.Tensor, torch.Tensor]],
    segments: tuple[Segment, ...],
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attends queries to the depth-0 prefix of their document and to their own keys of later depths.

    Args:
        q: [R, heads, d], the query rows of `segments` in order.
        prefix: depth-0 keys and values, [S, kv_heads, d] each.
        own: keys and values of depths 1..d, [R, kv_heads, d] each; row i belongs to query i.
        segments: documents and query rows; a query at row i sees the prefix rows j <= i of its own document.
        scale: factor of the scores.
        window: limits the prefix to j > i - window, None for no limit; own keys are always seen.

    Returns:
        [R, heads, d] in q's dtype. Differentiable in q, prefix and own.
    """
    if not segments:
        # No query rows: an empty result that still depends on all inputs, so that every parameter gets a gradient of 0.
        return q * 0.0 + sum((key.sum() + value.sum()) * 0.0 for key, value in [prefix, *own])
    flat = [tensor for pair in own for tensor in pair]
    return _UnrolledAttention.apply(segments, scale, window, q, *prefix, *flat)
