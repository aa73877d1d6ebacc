"""The cache of verified rows gives every layer the keys of all rows so far."""

from __future__ import annotations

import pytest
import torch

from speculators.nn.cache import KeyBuffer


def attended(parts, window):
    """Positions, and the attention of two layers with different keys, over seven rows that arrive in these parts."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, heads, 4, generator=generator) for heads in (2, 1, 1))
    cache, positions, out = KeyBuffer(), [], []
    start = 0
    for count in parts:
        rows = slice(start, start + count)
        positions.append(cache.extend(torch.zeros(count)))
        attend = cache.attend_newest(scale=0.5, window=window)
        out.append(torch.stack([attend(layer, q[rows], k[rows] + layer, v[rows] - layer) for layer in (0, 1)], 1))
        start += count
    assert cache.length == len(cache.read(1)[0]) == 7
    return torch.cat(positions), torch.cat(out)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_taken_in_bit_by_bit_attend_as_if_at_once(window):
    """In every layer each row sees all earlier ones, however many arrive at once."""
    positions, whole = attended([7], window)
    assert positions.tolist() == list(range(7))
    for parts in ([3, 1, 3], [1, 6]):
        again, found = attended(parts, window)
        assert torch.equal(again, positions)
        assert torch.allclose(found, whole, atol=1e-6)
