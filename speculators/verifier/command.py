"""Runs Python programs of this environment without a shell, reporting progress while they work."""

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
    """Runs `python *arguments` with this interpreter; kills it if we are interrupted.

    Args:
        arguments: what follows the interpreter's name.
        progress: receives the elapsed seconds twice per second.
        note: describes the work to the reader.
        environment: variables added to our own.

    Returns:
        The exit code, and the program's output (stdout and stderr together).
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
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
        output.seek(0)
        return code, output.read().decode("utf-8", errors="replace").strip()
