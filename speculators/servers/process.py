"""Runs a server in the foreground until it is stopped, without a shell."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

# For a server to finish what it has and to free its devices, once it was asked to stop.
GRACE_SECONDS = 15.0


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
