"""The mask of the one kernel: which keys a query sees, and which tiles the kernel therefore computes."""

from __future__ import annotations

import pytest
import torch
from nn.eager_flex import eager_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from speculators.nn import block, flex
from speculators.nn.block import Blocks, block_attention

# Documents of which some end within a tile, one starts with blocks that have no context, and one has no block.
DOCUMENTS = ((0, 300), (300, 310), (310, 700), (700, 1000))
ANCHORS = torch.cat([torch.arange(0, 300, 7), torch.arange(310, 700, 3), torch.arange(900, 999, 50)])
CONTEXT = 1000


def blocks_of(even, include=0):
    sizes = torch.full_like(ANCHORS, 4) if even else 1 + torch.arange(len(ANCHORS)) % 5
    return Blocks.of(ANCHORS, sizes, ANCHORS + include, DOCUMENTS), sizes


def seen(sizes, window, causal, include):
    """What each query may see, written out: [R, CONTEXT + R] bool."""
    rows, queries = [], int(sizes.sum())
    for anchor, size in zip(ANCHORS.tolist(), sizes.tolist(), strict=True):
        start = next(start for start, stop in DOCUMENTS if start <= anchor < stop)
        for slot in range(size):
            row = torch.zeros(CONTEXT + queries, dtype=torch.bool)
            end = anchor + include
            row[start if window is None else max(start, end - window) : end] = True
            own = CONTEXT + len(rows) - slot
            row[own : own + (slot + 1 if causal else size)] = True
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("include", [0, 1])
def test_the_mask_shows_exactly_what_a_query_may_see(causal, window, even, include):
    """Its document's context before the block, the window, and its own block; no other block's or document's keys."""
    blocks, sizes = blocks_of(even, include)
    expected = seen(sizes, window, causal, include)
    mask = flex.run_mask(blocks.runs(CONTEXT, window, causal=causal), CONTEXT + len(blocks.ends))
    queries, keys = (torch.arange(size) for size in expected.shape)
    assert torch.equal(mask.mask_mod(0, 0, queries[:, None], keys), expected)
    assert_tiles_are_torchs(mask)


@pytest.mark.parametrize("start", [0, 1, flex.TILE - 1, 200])
@pytest.mark.parametrize("stop", [200, 2 * flex.TILE - 1, 2 * flex.TILE, 2 * flex.TILE + 1])
def test_tiles_begin_and_end_where_runs_do(start, stop):
    """A run that ends at the edge of a tile, or a key before or behind it, lists no tile too many and none too few."""
    queries = 2 * flex.TILE + 1
    runs = torch.tensor([start, stop, 400, 401])[:, None].expand(-1, queries)
    assert_tiles_are_torchs(flex.run_mask(runs, 450))


def assert_tiles_are_torchs(mask):
    """Compares the lists of tiles with those that torch itself finds by looking at every pair."""
    by_torch = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")
    for kind in ("kv", "q", "full_kv", "full_q"):
        mine, theirs = (listed(each, kind) for each in (mask, by_torch))
        assert mine == theirs, kind
    assert mask.shape == by_torch.shape


def listed(mask, kind):
    """The tiles of each row of a mask, in the order in which the kernel takes them."""
    counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
    return [row[:count] for row, count in zip(indices.tolist(), counts.tolist(), strict=True)]


def test_tiles_that_nobody_sees_are_not_computed():
    """The cost is that of the keys that are seen: here 38% of all tiles (counted: versions of torch differ)."""
    blocks, _ = blocks_of(even=True)
    mask = flex.run_mask(blocks.runs(CONTEXT, None, causal=False), CONTEXT + len(blocks.ends))
    tiles = mask.kv_indices[0, 0].numel()
    partial, full = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    assert full > 0
    assert (partial + full) / tiles < 0.4


def test_keys_that_a_query_may_not_see_get_no_gradient(monkeypatch):
    """Through the whole attention: one block's output depends on its own document and its own block alone."""
    monkeypatch.setattr(block, "_has_one_kernel", lambda q: True)
    monkeypatch.setattr(flex, "kernel", lambda: eager_kernel)
    blocks, _ = blocks_of(even=False)
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(blocks.ends), 2, 16), *[(CONTEXT, 1, 16)] * 2, *[(len(blocks.ends), 1, 16)] * 2]
    q, *keys_values = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    out = block_attention(q, tuple(keys_values[:2]), tuple(keys_values[2:]), blocks, scale=0.25, window=50)
    chosen = 60
    rows = blocks.groups[chosen][blocks.groups[chosen] >= 0]
    k, v, own_k, own_v = torch.autograd.grad(out[rows].square().sum(), keys_values)
    end = int(ANCHORS[chosen])
    assert torch.equal(used(k, v), torch.arange(max(310, end - 50), end))
    assert torch.equal(used(own_k, own_v), rows)


def used(k, v):
    assert torch.equal(k.abs().sum((1, 2)) > 0, v.abs().sum((1, 2)) > 0)
    return torch.nonzero(v.abs().sum((1, 2)))[:, 0]


def test_rows_of_other_lengths_compile_nothing_again():
    """One compilation serves all rows of more than a tile of queries, whatever their lengths and masks."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad():
        for queries, context in ((600, 1000), (300, 700), (256, 128), (flex.TILE + 1, 20)):
            starts = torch.arange(queries) % 50
            runs = torch.stack((starts, starts + 60, context + starts, context + starts + 1))
            q, k = (torch.randn(1, heads, size, 16) for heads, size in ((4, queries), (2, context + queries)))
            run(q, k, k, block_mask=flex.run_mask(runs, context + queries), scale=0.25, enable_gqa=True)
    assert len(compiled) == 1
