"""RMSNorm in its weight's dtype, which stays float32 in mixed-precision training."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """Scales the last dimension to unit root mean square: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norms [..., size] and returns the weight's dtype."""
        # Under autocast a float32 master weight thus keeps the norm in float32, where bf16 sums would lose digits.
        return nn.functional.rms_norm(x.to(self.weight.dtype), (len(self.weight),), self.weight, self.eps)
