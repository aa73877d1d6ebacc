"""torch's own FlexAttention without a compiler, which computes on a CPU, and, unlike its front door, backward too."""

from __future__ import annotations

from torch._higher_order_ops.flex_attention import flex_attention


def eager_kernel(q, k, v, *, block_mask, scale, enable_gqa, kernel_options):
    """Stands in for `flex.kernel()`: a dense attention that asks `mask_mod` about every pair."""
    assert enable_gqa
    assert kernel_options == {"BACKEND": "TRITON"}
    return flex_attention(q, k, v, lambda score, *_: score, block_mask.as_tuple(), scale, {})[0]
