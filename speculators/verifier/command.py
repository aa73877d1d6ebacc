"""Runs other programs without a shell: one of our own environment that ticks, a server until it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from speculators.events import Progress, ProgressEvent

_TICK_SECONDS = 0.5
# For a server to finish what it has and to free its devices, once it was asked to stop.
GRACE_SECONDS = 15.0


def run_python(
    arguments: Sequence[str], *, progress: Progress, note: str, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs `python *arguments` with this interpreter, without a shell; stops it if we are interrupted.

    Args:
        arguments: what follows the interpreter's name.
        progress: is told twice a second how long it has taken.
        note: what is being done, for the reader.
        environment: variables added to our own.

    Returns:
        The exit code, and what the program wrote (stdout and stderr together).
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        try:
            while True:
                progress(ProgressEvent(stage="verifier", done=time.monotonic() - started, unit="s", note=note))
                try:
                    code = child.wait(timeout=_TICK_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        said.seek(0)
        return code, said.read().decode("utf-8", errors="replace").strip()


def run_until_stopped(command: Sequence[str], environment: Mapping[str, str], *, grace: float = GRACE_SECONDS) -> int:
    """Runs a program without a shell, passing on what stops us; returns its exit code.

    It has a process group of its own: of a terminal's Ctrl-C it hears once, from us, and if it does not end by then its
    whole group is killed.
    """
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=grace)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        signal.signal(signal.SIGTERM, before)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
