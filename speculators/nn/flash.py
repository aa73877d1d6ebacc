"""Causal attention over packed documents that yields its log-sum-exp, with a backward that accepts a merged one.

A caller that merges further keys into the softmax (see attention.py) needs the log-sum-exp L of each query. The
gradients of the keys seen here stay exact if backward receives the merged output and the merged L: P = exp(s - L) is
the merged softmax's probability, whatever other keys L covers.

Shapes: queries [R, heads, d] in the order of the segments, keys and values [S, kv_heads, d]; query head h reads kv head
h // (heads // kv_heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import attrs
import torch

from speculators.nn.layout import Segment, on_host
from speculators.nn.precision import has_bf16_products

_aten = torch.ops.aten

# Up to this length the CPU's backward kernel is faster in float32 than in bf16, whose calls cost a millisecond each:
# 1.2 against 3.4 ms at 163 tokens, 9.6 against 13 at 600, 22 against 18 at 1,000 (AMX, nine heads of 64, two threads).
SHORT_PIECE = 768


@attrs.frozen
class Piece:
    """One dense block of the attention: queries [q0, q1) over keys [k0, k1).

    Attributes:
        causal: query q0 + i sees keys k0 .. k0 + i; otherwise all keys that `band` and `ends` allow.
        merges: an earlier piece covers other keys of the same queries.
        band: (offset, window): query q0 + i sees key k0 + j if offset + i - window < j <= offset + i; None: no limit.
        ends: [q1 - q0] int64 on the host: query q0 + i sees keys k0 .. ends[i] - 1. Such a piece needs a mask anyway,
            so the query heads of one kv head are laid end to end: kernels are faster on more queries at once.
        window: with `ends`, a query sees only its last `window` keys.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    merges: bool = False
    band: tuple[int, int] | None = None
    ends: torch.Tensor | None = None
    window: int | None = None


def _pieces(segments: tuple[Segment, ...], window: int | None) -> Iterator[Piece]:
    offset = 0
    for segment in segments:
        length = segment.stop - segment.first
        if window is not None and segment.stop - segment.start > window:
            yield from _banded(segment, offset, window)
        else:
            # Queries start inside the document: all see the rows before the first query, then causally each other. Two
            # pieces instead of one with a mask, since the kernels skip the upper triangle of a causal piece.
            past = segment.first > segment.start
            if past:
                yield Piece(offset, offset + length, segment.start, segment.first, causal=False)
            yield Piece(offset, offset + length, segment.first, segment.stop, causal=True, merges=past)
        offset += length


def _banded(segment: Segment, offset: int, window: int) -> Iterator[Piece]:
    """Cuts a windowed segment into blocks of `window` queries, which see at most 2 * window keys: cost S * window."""
    for first in range(segment.first, segment.stop, window):
        stop = min(first + window, segment.stop)
        k0 = max(segment.start, first - window + 1)
        q0 = offset + first - segment.first
        yield Piece(q0, q0 + stop - first, k0, stop, causal=False, band=(first - k0, window))


def _heads_first(x: torch.Tensor, kv_heads: int, piece: Piece) -> torch.Tensor:
    """Views [n, heads, ...] as [kv_heads, group, n, ...], or with `ends` as [kv_heads, 1, group * n, ...]."""
    x = x.unflatten(1, (kv_heads, -1)).movedim(0, 2)
    return x if piece.ends is None else x.flatten(1, 2)[:, None]


def _rows_first(x: torch.Tensor, kv_heads: int, piece: Piece) -> torch.Tensor:
    """Undoes `_heads_first`: -> [n, heads, ...]."""
    return x.reshape(kv_heads, -1, piece.q1 - piece.q0, *x.shape[3:]).movedim(2, 0).flatten(1, 2)


def _band_mask(piece: Piece, like: torch.Tensor) -> torch.Tensor | None:
    """Makes the additive mask [queries, keys] of a piece, 0 or -inf; None if causality or nothing limits it."""
    key = torch.arange(piece.k1 - piece.k0, device=like.device)[None, :]
    if piece.ends is not None:
        # One end per query, repeated for the heads laid end to end.
        ends = piece.ends.repeat(like.shape[2] // len(piece.ends))
        end = ends.to(like.device, non_blocking=True)[:, None] - piece.k0
        seen = key < end if piece.window is None else (key < end) & (key >= end - piece.window)
    elif piece.band is not None:
        offset, window = piece.band
        query = torch.arange(piece.q1 - piece.q0, device=like.device)[:, None] + offset
        seen = (key <= query) & (key > query - window)
    else:
        return None
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[Segment, ...], scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends every query to its document's keys up to itself.

    The CPU has a flash kernel for every dtype, CUDA for the 16-bit ones from Ampere on; these never store scores. Where
    there is none, all scores of a document are stored, heads * rows * rows, forward and backward (with a window, those
    of one block of `window` rows), which only suits tests and short documents.

    Args:
        q: [R, heads, d].
        k: [S, kv_heads, d].
        v: [S, kv_heads, d].
        segments: which rows the queries are and where their documents lie.
        scale: factor of the scores.
        window: a query at row i sees only keys j > i - window; None for no limit.

    Returns:
        The output [R, heads, d] in q's dtype and the log-sum-exp [R, heads] in float32 (float64 for float64).

    Raises:
        ValueError: the window is below 1: a query would not even see itself.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if has_cuda_flash(q):
        return _cuda_forward(q, k, v, segments, scale, window)
    return piecewise(q, k, v, tuple(_pieces(segments, window)), scale)


def piecewise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: tuple[Piece, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends piece by piece; shapes as of `causal_attention`. Queries that are in no piece get 0 and -inf."""
    # Query heads are grouped by their kv head, so that keys are never repeated in memory.
    kv_heads = k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    for piece in pieces:
        queries = _heads_first(q[piece.q0 : piece.q1], kv_heads, piece)
        keys, values = (_spread(x[piece.k0 : piece.k1], queries.shape[1]) for x in (k, v))
        # The kernel returns the log-sum-exp beside the output: [kv_heads, group, n].
        part, part_lse = _block_forward(queries, keys, values, piece, scale)
        part, part_lse = (_rows_first(x, kv_heads, piece) for x in (part, part_lse))
        rows = slice(piece.q0, piece.q1)
        if piece.merges:
            part, part_lse = merge(out[rows], lse[rows], part, part_lse)
        out[rows], lse[rows] = part, part_lse
    return out, lse


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges two attentions of the same queries over disjoint keys: outputs [R, heads, d], log-sum-exp [R, heads].

    L = logaddexp(L_a, L_b), O = exp(L_a - L) O_a + exp(L_b - L) O_b.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return (out_a * share_a + out_b * share_b).to(out_a.dtype), lse


def _spread(x: torch.Tensor, group: int) -> torch.Tensor:
    """Views [n, kv_heads, d] as [kv_heads, group, n, d]; query heads of a group share their keys by a stride of 0."""
    return x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)


def _has_flash(q: torch.Tensor) -> bool:
    """Whether the device has a flash kernel for single pieces; elsewhere a piece's scores are computed in full."""
    return q.device.type == "cpu"


def _block_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _band_mask(piece, q)
    if _has_flash(q):
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, piece.causal, attn_mask=mask, scale=scale
        )
    scores = _scores(q, k, piece, scale, mask)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(scores.dtype)).to(q.dtype), lse


def _scores(q: torch.Tensor, k: torch.Tensor, piece: Piece, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Computes the scores of one piece, in float32 or float64, for devices and dtypes without a flash kernel."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if piece.causal:
        # True above the diagonal: keys that come after the query.
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores if mask is None else scores + mask


def causal_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of q, k and v, given the *merged* output and log-sum-exp.

    Args:
        grad_out: [R, heads, d].
        q: [R, heads, d].
        k: [S, kv_heads, d].
        v: [S, kv_heads, d].
        out: [R, heads, d], over all keys, those of the caller included.
        lse: [R, heads], likewise.

    Returns:
        Gradients of q, k and v; on CPU at least in float32, since several pieces add into the same rows.
    """
    if has_cuda_flash(q):
        return _cuda_backward(grad_out, q, k, v, out, lse, segments, scale, window)
    return piecewise_backward(grad_out, q, k, v, out, lse, tuple(_pieces(segments, window)), scale)


def piecewise_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pieces: tuple[Piece, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of `causal_attention_backward` piece by piece."""
    if _has_flash(q) and all(max(piece.q1 - piece.q0, piece.k1 - piece.k0) <= SHORT_PIECE for piece in pieces):
        grad_out, q, k, v, out = (x.to(lse.dtype) for x in (grad_out, q, k, v, out))
    kv_heads = k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    for piece in pieces:
        rows, cols = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
        queries, output, grad = (_heads_first(x[rows], kv_heads, piece) for x in (q, out, grad_out))
        keys, values = (_spread(x[cols], queries.shape[1]) for x in (k, v))
        # The CPU's backward kernel reads the log-sum-exp as a dense tensor.
        row_lse = _heads_first(lse[rows], kv_heads, piece).contiguous()
        dq, dk, dv = _block_backward(grad, queries, keys, values, output, row_lse, piece, scale)
        grad_q[rows] += _rows_first(dq, kv_heads, piece)
        # Keys and values of a kv head add up over its group of query heads.
        grad_k[cols] += dk.sum(1, dtype=lse.dtype).transpose(0, 1)
        grad_v[cols] += dv.sum(1, dtype=lse.dtype).transpose(0, 1)
    return grad_q, grad_k, grad_v


def _block_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    piece: Piece,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = _band_mask(piece, q)
    if _has_flash(q):
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, piece.causal, attn_mask=mask, scale=scale
        )
    # P = exp(s - L), dS = P (dO . v - dO . O) scale, dK = dS^T q, dV = P^T dO, dQ = dS k.
    probs = (_scores(q, k, piece, scale, mask) - lse[..., None]).exp()
    wide = grad.to(probs.dtype)
    delta = (wide * out.to(probs.dtype)).sum(-1, keepdim=True)
    grad_scores = probs * (wide @ v.to(probs.dtype).transpose(-1, -2) - delta) * scale
    grad_k, grad_v = grad_scores.transpose(-1, -2) @ q.to(probs.dtype), probs.transpose(-1, -2) @ wide
    return grad_scores @ k.to(probs.dtype), grad_k, grad_v


@lru_cache(maxsize=4)
@on_host()
def _cuda_layout(
    segments: tuple[Segment, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Lays the key rows of segments end to end, with the cumulative lengths that the variable-length kernel takes.

    Cached for the other layers, the other depths and the backward of the same row. Nothing waits for the device.
    """
    queries = [segment.stop - segment.first for segment in segments]
    keys = [segment.stop - segment.start for segment in segments]
    index = torch.cat([torch.arange(segment.start, segment.stop) for segment in segments])
    ends = (torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (queries, keys))
    index, ends_q, ends_k = (x.to(device, non_blocking=True) for x in (index, *ends))
    return index, ends_q, ends_k, max(queries), max(keys)


def has_cuda_flash(q: torch.Tensor) -> bool:
    """Whether CUDA has a flash kernel over packed documents: for 16 bits, on the GPUs that multiply bf16."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and has_bf16_products("cuda")


def _cuda_window(window: int | None) -> dict[str, int | None]:
    """Translates a window for the kernel, which counts only the keys to the left of a query's own."""
    return {
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
    }


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: tuple[Segment, ...], scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    index, ends_q, ends_k, longest_q, longest_k = _cuda_layout(segments, k.device)
    # Flash aligns a causal mask to the lower right: the last query sees the last key, which is what a segment means.
    out, lse, *_ = _aten._flash_attention_forward(
        q, k[index], v[index], ends_q, ends_k, longest_q, longest_k, 0.0, True, False,
        scale=scale, **_cuda_window(window),
    )  # fmt: skip
    return out, lse.transpose(0, 1)


def _cuda_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index, ends_q, ends_k, longest_q, longest_k = _cuda_layout(segments, k.device)
    # Without dropout the kernel does not read its random state.
    no_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grad_q, dk, dv = _aten._flash_attention_backward(
        grad_out.contiguous(), q, k[index], v[index], out, lse.transpose(0, 1).contiguous(), ends_q, ends_k,
        longest_q, longest_k, 0.0, True, no_state, no_state[:0], scale=scale, **_cuda_window(window),
    )  # fmt: skip
    return grad_q, torch.zeros_like(k).index_add_(0, index, dk), torch.zeros_like(v).index_add_(0, index, dv)
