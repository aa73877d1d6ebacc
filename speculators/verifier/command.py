"""Runs other programs without a shell: one of our own environment that ticks, a server until it is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from speculators.events import Progress, ProgressEvent

_TICK_SECONDS = 0.5


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
