"""Which precision a device computes in: "bfloat16" allows rounding, it does not demand it.

A CPU without instructions for bf16 products (AVX512-BF16 or AMX; most laptops) makes them at 17 GFLOPS at most, where
float32 makes 70 to 180 (benchmarks/RESULTS.md, "Two kinds of CPU"): there what may be computed in bf16 is computed in
float32, which rounds less and takes twice the memory. Whoever starts a run says so (pipeline/run.py).
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@cache
def has_bf16_products(device_type: str) -> bool:
    """Returns whether devices of this type multiply bf16 matrices at least as fast as float32 ones."""
    if device_type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns `dtype`, or float32 for bfloat16 on a device without bf16 products."""
    if dtype == torch.bfloat16 and not has_bf16_products(device.type):
        return torch.float32
    return dtype


def place(model: Model, device: torch.device) -> Model:
    """Moves a model to a device, in place; bfloat16 becomes float32 where the device has no bf16 products."""
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(compute_dtype(tensor.dtype, device))
    return model
