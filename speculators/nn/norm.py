"""RMSNorm computed in float32 whatever the compute dtype."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape, in the weight's dtype (float32 masters stay float32 under autocast)."""
        return nn.functional.rms_norm(x.to(self.weight.dtype), (len(self.weight),), self.weight, self.eps)
