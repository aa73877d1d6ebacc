"""Chooses the precision that a device computes in: "bfloat16" permits rounding, it does not require it.

A CPU without instructions for bf16 products (AVX512-BF16 or AMX), as in most laptops, reaches at most 17 GFLOPS with
them and 70 to 180 in float32 (benchmarks/RESULTS.md, "Two kinds of CPU"). There, bfloat16 is replaced by float32, which
rounds less and takes twice the memory. The same holds for GPUs before Ampere (V100, T4), which also lack flash kernels
for 16 bits. The pipeline reports it (pipeline/setup.py).
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

# Compute capability of Ampere, the first with bf16 products and flash kernels.
AMPERE = (8, 0)


@cache
def has_bf16_products(device_type: str) -> bool:
    """Whether devices of this type multiply bf16 matrices at least as fast as float32 ones.

    For "cuda" this asks this process's GPU; without one, a plan is for a GPU that does.
    """
    if device_type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= AMPERE
    if device_type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Replaces bfloat16 by float32 on a device without bf16 products; keeps other dtypes."""
    if dtype == torch.bfloat16 and not has_bf16_products(device.type):
        return torch.float32
    return dtype


def beside_verifier(verifier: torch.dtype, device: torch.device) -> torch.autocast:
    """Returns the context in which a float32 draft in training computes on a GPU as it will beside its verifier.

    There 16 bits are several times as fast, and what is measured is what will be served. A CPU computes in float32.
    """
    dtype = compute_dtype(verifier, device)
    return torch.autocast(device.type, dtype=dtype, enabled=device.type != "cpu" and dtype.itemsize == 2)


def place(model: Model, device: torch.device, *, beside: torch.dtype = torch.float32) -> Model:
    """Moves a model to a device in place, in the precision of `compute_dtype`.

    Args:
        beside: dtype of the verifier that it drafts for. Beside a 16-bit verifier the draft has its dtype, as in
            servers, which run both in one.
    """
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        narrow = tensor.is_floating_point() and beside.itemsize < tensor.dtype.itemsize
        tensor.data = tensor.data.to(compute_dtype(beside if narrow else tensor.dtype, device))
    return model
