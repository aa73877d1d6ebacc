"""Starts this checkout's programs in processes of their own, with time limits. No torch here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import attrs

ROOT = Path(__file__).parents[2]
# The interpreter of every process; the tests put the stand-in's here.
PYTHON: list[str] = [sys.executable]
# From SIGTERM, after which `spec` and torchrun end in order, to SIGKILL.
GRACE_SECONDS = 10.0


@attrs.frozen(kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; None if it was ended at its time limit.
    """

    code: int | None
    out: str
    err: str

    @property
    def tail(self) -> str:
        """The last line that it printed, for a reason."""
        lines = [line for line in (self.err.strip() or self.out).splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "no output"


@attrs.frozen
class Child:
    """A running `python -m module arguments`, offline, at the root of the checkout.

    Attributes:
        leader: it leads a group of its own, which ends with it; otherwise it stays in this process's group.
    """

    process: subprocess.Popen[str]
    leader: bool = False

    @classmethod
    def start(
        cls,
        module: str,
        *arguments: object,
        out: IO[str],
        err: IO[str],
        cache: Path | None = None,
        leader: bool = False,
    ) -> Child:
        """Starts it; `cache` takes the place of the user's own."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if cache is not None:
            environment["SPECULATORS_CACHE"] = str(cache)
        command = [*PYTHON, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=err, text=True, start_new_session=leader
        )
        return cls(process, leader)

    def end(self) -> None:
        """Ends what is left of it, in order if it can."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_SECONDS
            self._signal(number)
            while self._is_alive() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _signal(self, number: int) -> bool:
        try:
            if self.leader:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        except ProcessLookupError:
            return False
        return True

    def _is_alive(self) -> bool:
        return self.process.poll() is None or (self.leader and self._signal(0))


def run(
    module: str,
    *arguments: object,
    seconds: float,
    folder: Path,
    cache: Path | None = None,
    leader: bool = False,
) -> Ended:
    """Runs `python -m module arguments` to its end or its time limit; its output is kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = (folder / f"{module}-{time.monotonic_ns()}.{name}" for name in ("out", "err"))
    code: int | None = None
    with out.open("w", encoding="utf-8") as stdout, err.open("w", encoding="utf-8") as stderr:
        child = Child.start(module, *arguments, out=stdout, err=stderr, cache=cache, leader=leader)
        try:
            code = child.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            child.end()
    return Ended(code=code, out=out.read_text("utf-8", "replace"), err=err.read_text("utf-8", "replace"))


def spec(*arguments: object, seconds: float, folder: Path) -> Ended:
    """Runs `spec` with its cache below `folder`."""
    return run("speculators.cli", *arguments, seconds=seconds, folder=folder / "output", cache=folder / "cache")


def overriding(*values: str) -> tuple[str, ...]:
    """Puts `--set` before each override."""
    return tuple(part for value in values for part in ("--set", value))
