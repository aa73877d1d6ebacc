"""Child processes in our own Python environment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from speculators.events import ProgressEvent
from speculators.verifier.command import run_python


def test_output_and_code_are_returned_and_time_is_reported():
    """Both streams are collected for the error message, and progress ticks with the note."""
    events: list[ProgressEvent] = []
    script = "import sys, time; print('out'); sys.stderr.write('err'); time.sleep(0.7); sys.exit(3)"
    code, output = run_python(["-c", script], progress=events.append, note="working")
    assert code == 3
    assert {"out", "err"} <= set(output.replace("errout", "err out").replace("outerr", "out err").split())
    assert len(events) >= 2
    assert {event.note for event in events} == {"working"}


def test_an_interrupt_stops_the_program_too(tmp_path: Path):
    """Ctrl-C while we wait kills the program: no download or conversion continues in the background."""
    pid_file = tmp_path / "pid"
    script = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt(event: ProgressEvent) -> None:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_python(["-c", script], progress=interrupt, note="")
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
