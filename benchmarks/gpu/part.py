"""Runs one part of the check, in a process of its own: python -m benchmarks.gpu.part NAME FOLDER [--small]."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import torch

from benchmarks.gpu.lines import FAILED, VerdictLine
from benchmarks.perf.side_by_side import report
from speculators.training.world import start

# Before the time limit: to end a program in order, and to read what it left.
RESERVE_SECONDS = 5


@attrs.frozen(kw_only=True)
class PartSetup:
    """What every part is given.

    Attributes:
        device: the GPU; with `small` also a CPU.
        small: tiny shapes.
        folder: shared by all parts of a check.
        until: when the part must end, by the monotonic clock, which Linux counts from its start.
    """

    device: torch.device
    small: bool
    folder: Path
    until: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds for a program that the part starts, so that the part can still report on it."""
        return max(1.0, self.until - RESERVE_SECONDS - time.monotonic())

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives freed memory back, and restarts the count of the peak."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak_gb(self) -> float:
        """The most memory that tensors took since `release`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

    def milliseconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Times some work, the mean of `repeats` after one that warms up."""
        work()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return 1e3 * (time.perf_counter() - began) / repeats


def main() -> None:
    """Prints the part's lines as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=float, default=float("inf"), help="the time limit, by the monotonic clock")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    # Before anything uses CUDA: it sets what cuBLAS needs to repeat its sums.
    world = start()
    if world.device.type != "cuda" and not options.small:
        reason = "torch sees no GPU (torch.cuda.is_available() is False); --small runs on a CPU"
        report(attrs.asdict(VerdictLine(name="GPU", verdict=FAILED, reason=reason)))
        return
    setup = PartSetup(device=world.device, small=options.small, folder=options.folder, until=options.until)
    for line in importlib.import_module(f"benchmarks.gpu.{options.name}").lines(setup):
        report(attrs.asdict(line))


if __name__ == "__main__":
    main()
