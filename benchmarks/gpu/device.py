"""The part `device`: what all other numbers were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from speculators.nn.precision import AMPERE
from speculators.pipeline.run_lock import code_here


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields the GPU and the versions."""
    if setup.device.type == "cuda":
        yield judged("GPU", lambda: gpu(setup.device))
    else:
        yield VerdictLine(name="GPU", reason="a CPU: nothing below says anything about a GPU")
    yield judged("versions", versions)


def gpu(device: torch.device) -> Judged:
    """Describes the GPU; one before Ampere has neither bf16 products nor flash kernels."""
    facts = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    figures = {
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, capability)),
        "memory_gb": facts.total_memory / 1e9,
        "multiprocessors": facts.multi_processor_count,
    }
    return figures, "" if capability >= AMPERE else "older than Ampere: no bf16 products and no flash kernels"


def versions() -> Judged:
    """Lists the versions that decide which kernels run, and that of this code."""
    code = code_here()
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "commit": code.commit or f"none; sources {code.sources[:12]}",
        "changed_since": code.dirty,
    }
    return figures, ""
