"""Attention in one kernel where each query sees two runs of keys: FlexAttention, compiled for the GPU.

The kernel computes in tiles of queries x keys. The mask lists the tiles in which something is seen, and which of these
need no look at single keys, so that tiles that nobody sees cost nothing, forward and backward.

Repeatable: torch documents nothing about it, but the Triton kernel has no atomic additions. One program computes each
tile of dq, and one each tile of dk and dv, over all query heads of the kv head, in the order of the mask's lists (read
in torch 2.14). Other back ends may add in another order, so the back end is named, and nothing is tuned by timing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Queries and keys of a tile; the kernel's own default.
TILE = 128
# Triton multiplies nothing narrower.
SMALLEST_HEAD = 16


@cache
def kernel() -> Callable[..., torch.Tensor]:
    """Compiles the kernel once for rows of any length; tests put another function in its place.

    `fullgraph`, since torch would otherwise fall back without a word to an attention that stores all scores.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def run_mask(runs: torch.Tensor, num_keys: int) -> BlockMask:
    """Makes the mask of R queries over `num_keys` keys; nothing waits for the device, nothing is R x `num_keys`.

    Args:
        runs: [4, R] integers. Query i sees the keys [runs[0, i], runs[1, i]) and [runs[2, i], runs[3, i]); either may
            be empty.
    """
    runs = runs.to(torch.int32)
    # Apart, since the kernel reads each by the query's index alone.
    first_start, first_stop, second_start, second_stop = (run.clone() for run in runs)

    def is_seen(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        in_first = (key >= first_start[query]) & (key < first_stop[query])
        return in_first | ((key >= second_start[query]) & (key < second_stop[query]))

    tile = torch.arange(0, num_keys, TILE, device=runs.device, dtype=torch.int32)  # [tiles]
    start, stop = runs[0::2, :, None], runs[1::2, :, None]  # [2, R, 1]
    touched = ((start < tile + TILE) & (stop > tile) & (start < stop)).any(0)  # [R, tiles]
    covered = ((start <= tile) & (stop >= tile + TILE)).any(0)
    some, full = _by_query_tile(touched).any(1), _by_query_tile(covered).all(1)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), TILE, mask_mod=is_seen, seq_lengths=(runs.shape[1], num_keys)
    )


def _by_query_tile(marks: torch.Tensor) -> torch.Tensor:
    """Cuts [R, tiles] into tiles of queries, [query tiles, TILE, tiles]; queries that fill up the last have no mark."""
    return torch.nn.functional.pad(marks, (0, 0, 0, -len(marks) % TILE)).unflatten(0, (-1, TILE))


def _listed(marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts the marked tiles [query tiles, tiles] of each row, and lists them in order, the others behind them."""
    count = marked.sum(-1, dtype=torch.int32)
    order = marked.int().argsort(dim=-1, descending=True, stable=True)
    return count[None, None], order.int()[None, None]


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float) -> torch.Tensor:
    """Attends [R, heads, d] to keys and values [S, kv_heads, d] in one softmax; returns [R, heads, d]."""
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    options = {"BACKEND": "TRITON"}
    out = kernel()(*heads_first, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options)
    return out[0].transpose(0, 1)
