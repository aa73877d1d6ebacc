"""The part `sigterm`: a run that a scheduler stops goes on to the weights of one that nobody stopped."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.command import Child, Ended, overriding, spec
from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup

# Exit code of `spec` after SIGTERM.
INTERRUPTED = 130


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields one line."""
    yield judged("SIGTERM and resume", partial(resumed, setup))


def resumed(setup: PartSetup) -> Judged:
    """Trains the smoke recipe for longer, whole and in two pieces, and compares the exported files."""
    steps = 12 if setup.small else 300
    options = [
        "smoke",
        "--quiet",
        *overriding(f"schedule.max_steps={steps}", "schedule.checkpoint_every=50", "benchmark.suites=[]"),
    ]
    folder = setup.folder / "sigterm"
    whole = spec("run", *options, "--runs", folder / "whole", seconds=setup.left, folder=folder)
    if whole.code != 0:
        return {}, f"the whole run ended with {whole.code}: {whole.tail}"
    stopped = _stopped(setup, options, folder)
    at = _updates(folder / "stopped")
    if stopped.code != INTERRUPTED:
        return {"updates": at}, f"the run that got SIGTERM ended with {stopped.code}, not {INTERRUPTED}: {stopped.tail}"
    again = spec("run", *options, "--runs", folder / "stopped", seconds=setup.left, folder=folder)
    if again.code != 0:
        return {"updates": at}, f"the resumed run ended with {again.code}: {again.tail}"
    same = _weights(folder / "whole") == _weights(folder / "stopped")
    figures = {"stopped_after_updates": at, "of": steps, "same_bits": same}
    return figures, "" if same else "the resumed run's weights differ from the whole run's"


def _stopped(setup: PartSetup, options: list[str], folder: Path) -> Ended:
    """Starts the run, and sends it SIGTERM after its second update."""
    out, err = folder / "stopped.out", folder / "stopped.err"
    with out.open("w", encoding="utf-8") as stdout, err.open("w", encoding="utf-8") as stderr:
        cache = folder / "cache"
        arguments = ["run", *options, "--runs", folder / "stopped"]
        child = Child.start("speculators.cli", *arguments, cache=cache, out=stdout, err=stderr)
        process = child.process
        try:
            while _updates(folder / "stopped") < 2 and process.poll() is None and setup.left > 1:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            code = process.wait(setup.left)
        finally:
            child.end()
    return Ended(code=code, out=out.read_text(encoding="utf-8"), err=err.read_text(encoding="utf-8"))


def _updates(runs: Path) -> int:
    return sum(file.read_text(encoding="utf-8").count('"StepEvent"') for file in runs.glob("*/events.jsonl"))


def _weights(runs: Path) -> str:
    (file,) = runs.glob("*/speculator/model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()
