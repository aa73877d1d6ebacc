"""Processes that start at once, because they are forked from a server that has imported everything they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from command import Spec

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch._dynamo", "speculators.pipeline", "speculators.report.bench"])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(real: Callable, due: Callable[[], bool]) -> Callable:
    """Wraps `real` so that it kills the process when `due` says so."""
    return lambda *arguments, **named: die() if due() else real(*arguments, **named)


def child(home: Path, threads: int, where: str) -> None:
    """Runs smoke in a process that dies at `where`."""
    from speculators import model
    from speculators.pipeline.context import Context

    torch.set_num_threads(threads)
    spec = Spec(home)
    if where == "in capture":
        os.fsync = deadly(os.fsync, lambda: any(spec.cache.rglob("states-*.safetensors.tmp")))
    elif where == "between updates":
        tell = Context.emit
        Context.emit = lambda self, event: die() if getattr(event, "step", 0) == 6 else tell(self, event)
    elif where == "in a checkpoint":
        os.fsync = deadly(os.fsync, lambda: any(spec.runs.rglob("writing-00000008")))
    elif where == "in the export":
        model.save_file = deadly(model.save_file, lambda: True)
    outcome = spec.run()
    (home / "said.txt").write_text(outcome.err)
    os._exit(outcome.code)


def spawn(home: Path, where: str) -> int | None:
    process = SERVER.Process(target=child, args=(home, torch.get_num_threads(), where))
    process.start()
    process.join(120)
    return process.exitcode
