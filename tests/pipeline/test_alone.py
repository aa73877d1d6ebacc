"""Concurrent launches: a run belongs to one launch at a time, and runs that share data make it only once."""

from __future__ import annotations

import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from command import Spec
from forked import SERVER

from speculators.events import ProgressEvent, StepEvent

SHORT = ("--set", "schedule.max_steps=2", "--set", "benchmark.suites=[]")


def child(home: Path, threads: int, seed: int, at: type, begun: Event, go: Event) -> None:
    """Runs smoke and stops at its first event of a kind until it is released."""
    from speculators.pipeline.context import Context

    torch.set_num_threads(threads)
    tell = Context.emit

    def waiting(self: Context, event: object) -> None:
        if isinstance(event, at) and getattr(event, "stage", "capture") == "capture" and not begun.is_set():
            begun.set()
            go.wait(120)
        tell(self, event)

    Context.emit = waiting
    outcome = Spec(home).run(*SHORT, "--set", f"seed={seed}")
    (home / f"said-{seed}.txt").write_text(outcome.err)
    os._exit(outcome.code)


class Launch:
    """A run of smoke in another process, stopped at its first event of a kind: an update, or one within the capture."""

    def __init__(self, home: Path, *, at: type, seed: int = 0) -> None:
        self.go = SERVER.Event()
        begun = SERVER.Event()
        arguments = (home, torch.get_num_threads(), seed, at, begun, self.go)
        self.process = SERVER.Process(target=child, args=arguments)
        self.process.start()
        assert begun.wait(120)

    def finish(self) -> int | None:
        """Releases the run and returns its exit code."""
        self.go.set()
        self.process.join(120)
        return self.process.exitcode


@pytest.mark.slow
def test_a_run_belongs_to_one_launch_at_a_time(fresh: Spec) -> None:
    """A second launch of the same run ends at once and says what to do; the first is not disturbed."""
    first = Launch(fresh.home, at=StepEvent)
    outcome = fresh.run(*SHORT)
    assert outcome.code == 1
    (error,) = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert error.endswith("another launch is working on this run")
    assert "wait until it ends, or give this one a folder of its own: --runs FOLDER" in outcome.err
    assert "Traceback" not in outcome.err
    assert first.finish() == 0
    assert fresh.run(*SHORT).code == 0


@pytest.mark.slow
def test_runs_of_two_seeds_share_captured_states(fresh: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run waits, and says so, until the first has captured the states; both end well."""
    from speculators.pipeline.context import Context

    first, tell = Launch(fresh.home, at=ProgressEvent, seed=0), Context.emit

    def told_of_waiting(self: Context, event: object) -> None:
        if isinstance(event, ProgressEvent) and "waiting for another process" in event.note:
            first.go.set()
        tell(self, event)

    monkeypatch.setattr(Context, "emit", told_of_waiting)
    second = fresh.run(*SHORT, "--set", "seed=1")
    assert first.go.is_set()
    assert first.finish() == 0
    assert second.code == 0, second.err
    assert "capture already done" in second.err
    assert "capture already done" not in (fresh.home / "said-0.txt").read_text()
    assert len(list(fresh.cache.glob("states/*/manifest.json"))) == 1
    assert len(list(fresh.runs.glob("*/speculator"))) == 2


def test_locks_of_a_killed_launch_block_nobody(fresh: Spec) -> None:
    """A launch killed during the capture leaves its lock files behind, and the next launch still runs."""
    first = Launch(fresh.home, at=ProgressEvent)
    os.kill(first.process.pid or 0, signal.SIGKILL)
    # `finish` would wait for ever: it sets an event for a process that died waiting for it.
    first.process.join(120)
    assert first.process.exitcode == -signal.SIGKILL
    assert list(fresh.runs.glob("*/.lock"))
    assert list(fresh.cache.glob("locks/.capture-*.lock"))
    outcome = fresh.run(*SHORT)
    assert outcome.code == 0, outcome.err
    assert "waiting for another process" not in outcome.err
