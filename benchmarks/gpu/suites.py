"""The part `suites`: the repository's tests of layers, losses and models where CUDA is torch's default device.

The tests choose no device: they make tensors on the default one, and some put parts on the CPU themselves (numpy,
files, models that are loaded there). Where both meet, torch refuses, which says nothing about the GPU. Those tests are
counted apart, as `refused`; every other failure is one. Tests that ask for CUDA by themselves run as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.command import run
from benchmarks.gpu.lines import FAILED, SKIPPED, Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup

SUITES = ("tests/nn", "tests/losses", "tests/models")
SMALL_SUITES = ("tests/losses",)


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for each folder of tests."""
    for folder in SMALL_SUITES if setup.small else SUITES:
        line = judged(folder, partial(tested, setup, folder))
        ran_none = line.verdict != FAILED and not line.figures["passed"]
        reason = "none of its tests can run with this default device: each mixes it with the CPU"
        yield VerdictLine(name=folder, verdict=SKIPPED, reason=reason, figures=line.figures) if ran_none else line


def tested(setup: PartSetup, folder: str) -> Judged:
    """Runs one folder's tests in one process, and counts how they ended."""
    record = setup.folder / f"{folder.replace('/', '-')}.json"
    options = ["-p", "benchmarks.gpu.default_device", "--default-device", setup.device.type, "--outcomes", record]
    parts = ["-n0", "-q", "-p", "no:cacheprovider", *options, folder]
    ended = run("pytest", *parts, seconds=setup.left, folder=setup.folder / "suites")
    if not record.exists():
        return {}, f"pytest ended with {ended.code}, without a record: {ended.tail}"
    outcomes = json.loads(record.read_text(encoding="utf-8"))
    figures = {name: len(tests) for name, tests in outcomes.items()}
    failed = outcomes["failed"]
    cut = "" if ended.code is not None else "ended at the time limit of the part; "
    return figures, cut + (f"{len(failed)} failed: {', '.join(failed[:5])}" if failed else "")
