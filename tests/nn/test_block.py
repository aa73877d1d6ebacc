"""The attention of blocks against a dense float64 reference."""

from __future__ import annotations

import pytest
import torch
from nn.eager_flex import eager_kernel

from speculators.nn import block, flash, flex
from speculators.nn.block import PIECE_QUERIES, Blocks, block_attention

# float64 on both sides: what differs is the order of sums of at most some hundred terms of magnitude 1.
TOLERANCE = 1e-10

DOCUMENTS = ((0, 7), (9, 30), (30, 41))
ANCHORS = torch.tensor([0, 3, 9, 12, 25, 29, 31, 38])


def make(sizes, heads=6, kv_heads=2, size=41):
    generator = torch.Generator().manual_seed(0)
    rows = int(sizes.sum())
    shapes = [(rows, heads, 8), *[(size, kv_heads, 8)] * 2, *[(rows, kv_heads, 8)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense(q, k, v, own_k, own_v, sizes, ends, window, causal, scale):
    """Every query with every key it may see, in one softmax."""
    group = q.shape[1] // k.shape[1]
    k, v, own_k, own_v = (x.repeat_interleave(group, 1) for x in (k, v, own_k, own_v))
    out, row = [], 0
    for anchor, size, end in zip(ANCHORS.tolist(), sizes.tolist(), ends.tolist(), strict=True):
        start = next(start for start, stop in DOCUMENTS if start <= anchor < stop)
        low = start if window is None else max(start, end - window)
        for slot in range(size):
            stop = row + (slot + 1 if causal else size)
            keys = torch.cat([k[low:end], own_k[row:stop]])
            values = torch.cat([v[low:end], own_v[row:stop]])
            weights = (torch.einsum("hd,khd->hk", q[row + slot], keys) * scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, values))
        row += size
    return torch.stack(out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("way", ["pieces on flash kernels", "pieces", "one kernel"])
def test_blocks_equal_dense(causal, window, even, include, way, monkeypatch):
    """Outputs and all gradients equal one softmax: packed documents, blocks of one and of several sizes, no context."""
    monkeypatch.setattr(flash, "_has_flash", lambda q: way == "pieces on flash kernels")
    monkeypatch.setattr(block, "_has_one_kernel", lambda q: way == "one kernel")
    monkeypatch.setattr(flex, "kernel", lambda: eager_kernel)
    monkeypatch.setattr("speculators.nn.block.PIECE_QUERIES", 5)
    sizes = torch.full((8,), 4) if even else torch.tensor([1, 4, 2, 3, 1, 5, 2, 1])
    ends = ANCHORS + include
    tensors = make(sizes)
    q, k, v, own_k, own_v = tensors
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = dense(*tensors, sizes, ends, window, causal, 0.3)
    blocks = Blocks.of(ANCHORS, sizes, ends, DOCUMENTS)
    got = block_attention(q, (k, v), (own_k, own_v), blocks, scale=0.3, window=window, causal=causal)
    assert (got - wanted).abs().max() < TOLERANCE
    grads = (torch.autograd.grad((each * weight).sum(), tensors) for each in (got, wanted))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE


def test_no_blocks_gives_nothing_but_keeps_the_graph():
    """A row without anchors has no queries; its gradients are zeros instead of missing."""
    q = torch.zeros(0, 4, 8, requires_grad=True)
    k = torch.randn(5, 2, 8, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    blocks = Blocks.of(empty, empty, empty, ((0, 5),))
    out = block_attention(q, (k, k), (q[:, :2], q[:, :2]), blocks, scale=1.0)
    out.sum().backward()
    assert out.shape == (0, 4, 8)
    assert k.grad is not None
    assert k.grad.abs().max() == 0


def test_a_mask_never_has_more_rows_than_a_piece():
    """The largest mask is that of one piece, for any number of anchors."""
    anchors = torch.arange(2048)
    blocks = Blocks.of(anchors, torch.full((2048,), 16), anchors, ((0, 2048),))
    assert max(piece.q1 - piece.q0 for piece in blocks.pieces(None)) <= PIECE_QUERIES
