"""A plug-in of pytest: runs tests with another default device, and records which it refused for mixing devices."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.gpu.command import ROOT

TESTS = ROOT / "tests"

# What torch, its stand-in and numpy say where a tensor of the device meets one of the CPU.
MIXED = re.compile(
    r"on the same device|mixes cuda:0 and the CPU|two devices|can't convert cuda|indices should be either on cpu"
    r"|Expected a '\w+' device type for generator|must be on the (same|CPU)|not on the expected device"
    r"|Cannot copy between|tensor on (cpu|cuda)|Pointer argument .* cpu tensor|dense CPU tensors"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares the options."""
    parser.addoption("--default-device", default="cuda", help="of all tensors that tests make")
    parser.addoption("--outcomes", type=Path, help="write the names of tests by outcome there, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the record of this session."""
    config.pluginmanager.register(OutcomeRecord(config.getoption("--outcomes"), config.getoption("--default-device")))


class OutcomeRecord:
    """The names of the tests that ended in each way, written after each test."""

    def __init__(self, file: Path, device: str) -> None:
        self.file, self.device = file, device
        self.tests: dict[str, list[str]] = {"passed": [], "failed": [], "refused": [], "skipped": []}

    @pytest.fixture(autouse=True)
    def _default_device(self) -> Iterator[None]:
        """Sets the device for the test alone: what is made once for many tests stays where it was made."""
        torch.set_default_device(self.device)
        with patch("torch.Generator", self._generator):
            yield
        torch.set_default_device(None)

    def _generator(self, device: torch.device | str | None = None, *, make: type = torch.Generator) -> torch.Generator:
        """Makes a test's own generator for the default device, which torch leaves on the CPU."""
        is_ours = Path(sys._getframe(1).f_code.co_filename).is_relative_to(TESTS)
        generator: torch.Generator = make(device or (self.device if is_ours else "cpu"))
        return generator

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Files one test."""
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        outcome: str = report.outcome
        if outcome == "failed" and MIXED.search(report.longreprtext):
            outcome = "refused"
        self.tests[outcome].append(report.nodeid)
        self.file.write_text(json.dumps(self.tests), encoding="utf-8")
