"""The attention of the unroll against a dense float64 reference."""

from __future__ import annotations

import pytest
import torch

from speculators.nn import flash
from speculators.nn.attention import unrolled_attention
from speculators.nn.layout import RowLayout, Segment, rows_of

# float64 on both sides: what differs is the order of sums of at most some hundred terms of magnitude 1.
TOLERANCE = 1e-10


def dense(q, prefix, own, segments, scale, window):
    """Scores of every query with every prefix key and its own keys, masked, in one softmax."""
    k, v = prefix
    group = q.shape[1] // k.shape[1]
    rows = rows_of(segments, q.device)
    starts = torch.cat([torch.full((s.stop - s.first,), s.start) for s in segments])
    keys = torch.arange(len(k))
    seen = (keys[None] <= rows[:, None]) & (keys[None] >= starts[:, None])
    if window is not None:
        seen &= keys[None] > rows[:, None] - window
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("rhd,shd->rhs", q, k) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    own = [(a.repeat_interleave(group, 1), b.repeat_interleave(group, 1)) for a, b in own]
    extra = [(q * a).sum(-1, keepdim=True) * scale for a, _ in own]
    weights = torch.cat([scores, *extra], -1).softmax(-1)
    out = torch.einsum("rhs,shd->rhd", weights[..., : len(k)], v)
    for index, (_, value) in enumerate(own):
        out = out + weights[..., len(k) + index, None] * value
    return out


def make(segments, size, depth, heads, kv_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(rows_of(segments, torch.device("cpu")))
    shapes = [(count, heads, 8), (size, kv_heads, 8), (size, kv_heads, 8)] + [(count, kv_heads, 8)] * (2 * depth)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


PACKED = (Segment(0, 0, 7), Segment(7, 9, 20), Segment(20, 31, 32), Segment(40, 40, 59))


@pytest.mark.parametrize("depth", range(8))
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("has_flash", [True, False])
def test_unroll_equals_dense(depth, window, heads, has_flash, monkeypatch):
    """Outputs and all gradients equal one masked softmax: packed documents, partial queries, GQA, window, k = 0..7;
    with the CPU's flash kernel, and by the plain one of devices that have none."""
    monkeypatch.setattr(flash, "_has_flash", lambda q: has_flash)
    tensors = make(PACKED, 64, depth, *heads)
    q, k, v, *rest = tensors
    own = list(zip(rest[::2], rest[1::2], strict=True))
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = dense(q, (k, v), own, PACKED, 0.3, window)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), tensors)
    got = unrolled_attention(q, (k, v), own, PACKED, scale=0.3, window=window)
    got_grads = torch.autograd.grad((got * weight).sum(), tensors)
    assert (got - wanted).abs().max() < TOLERANCE
    for mine, theirs in zip(got_grads, wanted_grads, strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: its flash kernel and its plain path")
@pytest.mark.parametrize("depth", range(8))
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, TOLERANCE), (torch.float32, 1e-4), (torch.bfloat16, 6e-2)]
)
def test_unroll_on_cuda_equals_dense(depth, window, heads, dtype, tolerance):
    """On CUDA the same cases stay within a share of the largest value, on the flash kernel (16 bits) and without it."""
    tensors = [t.detach().to(dtype).double().requires_grad_() for t in make(PACKED, 64, depth, *heads)]
    there = [t.detach().to("cuda", dtype).requires_grad_() for t in tensors]
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outs = []
    for attend, (q, k, v, *rest) in ((dense, tensors), (unrolled_attention, there)):
        own = list(zip(rest[::2], rest[1::2], strict=True))
        outs.append(attend(q, (k, v), own, PACKED, scale=0.3, window=window))
    wanted, got = outs
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), tensors)
    got_grads = torch.autograd.grad((got * weight.to(got)).sum(), there)
    for mine, theirs in zip((got, *got_grads), (wanted, *wanted_grads), strict=True):
        assert (mine.cpu().double() - theirs).abs().max() < tolerance * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("window", [None, 16])
def test_bfloat16_is_close_to_dense(window):
    """In bfloat16 the error stays within its 8 bits of precision."""
    tensors = make(PACKED, 64, 3, 6, 2)
    half = [t.detach().bfloat16().requires_grad_() for t in tensors]
    full = [t.detach().double().requires_grad_() for t in half]
    outs = []
    for q, k, v, *rest in (half, full):
        own = list(zip(rest[::2], rest[1::2], strict=True))
        outs.append(unrolled_attention(q, (k, v), own, PACKED, scale=0.3, window=window))
    assert (outs[0].double() - outs[1]).abs().max() < 3e-2
    grads = [torch.autograd.grad(out.sum(), tensors) for out, tensors in zip(outs, (half, full), strict=True)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine.double() - theirs).abs().max() < 6e-2


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_that_shows_nothing_is_refused(window):
    """A window below 1 is an error: such a query would not see itself, and its zeros would pass for an output."""
    q, k, v = make(PACKED, 64, 0, 4, 4)
    with pytest.raises(ValueError, match=f"at least 1, got {window}"):
        unrolled_attention(q, (k, v), [], PACKED, scale=1.0, window=window)


def test_no_queries_gives_nothing_but_keeps_the_graph():
    """A row without supervised places has no queries; its gradients are zeros instead of missing."""
    q = torch.zeros(0, 4, 8, requires_grad=True)
    k = torch.randn(5, 2, 8, requires_grad=True)
    out = unrolled_attention(q, (k, k), [], (), scale=1.0)
    out.sum().backward()
    assert out.shape == (0, 4, 8)
    assert k.grad is not None
    assert k.grad.abs().max() == 0


def test_layout_finds_documents_and_the_rows_a_loss_reaches():
    """A layout finds documents, padding and supervised places; a segment spans the first to the last reaching row."""
    documents = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 2])
    mask = torch.zeros(1, 13, dtype=torch.bool)
    mask[0, [4, 5, 8]] = True
    layout = RowLayout.of(documents, mask)
    assert layout.documents == ((0, 6), (6, 11))
    assert layout.places.tolist() == [4, 5, 8]
    assert layout.place_starts.tolist() == [0, 0, 6]
    assert layout.reaching(2, 3) == (Segment(0, 1, 4), Segment(6, 6, 7))


def test_short_documents_in_16_bits_have_float32s_gradients():
    """Up to SHORT_PIECE keys the CPU's backward computes in float32; its bf16 kernel is off by a hundredth."""
    generator = torch.Generator().manual_seed(0)
    q, out, grad = (torch.randn(9, 4, 8, generator=generator).bfloat16() for _ in range(3))
    k, v = (torch.randn(9, 2, 8, generator=generator).bfloat16() for _ in range(2))
    segments = (Segment(0, 0, 5), Segment(5, 6, 9))
    rows = slice(0, 8)
    _, lse = flash.causal_attention(q[rows], k, v, segments, 0.3, None)
    arguments = (grad[rows], q[rows], k, v, out[rows])
    narrow = flash.causal_attention_backward(*arguments, lse, segments, 0.3, None)
    wide = flash.causal_attention_backward(*(x.float() for x in arguments), lse, segments, 0.3, None)
    for gradient, expected in zip(narrow, wide, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
