"""`spec run` may be killed or stopped with Ctrl-C anywhere: nothing half-written is used, and the result is the
same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from command import WEIGHTS, Spec
from forked import spawn

from speculators.events import EvalEvent, Event, ProgressEvent, StageEvent, StepEvent
from speculators.report.progress import RunView

KILLED_AT = ("in capture", "between updates", "in a checkpoint", "in the export")


@pytest.mark.slow
def test_killed_in_four_places_it_ends_with_the_same_bytes(run_folder: Path, fresh: Spec) -> None:
    """After kill -9 during states, updates, a checkpoint and the export, each next call resumes the run."""
    for where in KILLED_AT:
        assert spawn(fresh.home, where) == -signal.SIGKILL, where
        assert not list(fresh.runs.rglob("train.json"))
        assert not list(fresh.runs.rglob("speculator"))
    assert spawn(fresh.home, "nowhere") == 0
    progress = (fresh.home / "said.txt").read_text()
    assert "prepare already done" in progress
    assert "capture already done" in progress
    assert "update 4:" not in progress
    assert fresh.weights() == (run_folder / WEIGHTS).read_bytes()
    assert fresh.half_written() == []


def at_stage(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StageEvent) and event.stage == name and event.status == "start"


def at_progress(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, ProgressEvent) and event.stage == name


CTRL_C_AT: dict[str, Callable[[Event], bool]] = {
    "verifier": at_stage("verifier"),
    "prepare": at_stage("prepare"),
    "end of prepare": at_progress("prepare"),
    "capture": at_progress("capture"),
    "suite": at_stage("suite"),
    "update": lambda event: isinstance(event, StepEvent) and event.step == 2,
    "evaluation": lambda event: isinstance(event, EvalEvent) and event.step == 4,
    "last evaluation": lambda event: isinstance(event, EvalEvent) and event.step == 8,
    "bench": at_stage("bench"),
    "live": at_progress("bench"),
}


def test_ctrl_c_at_each_stage_is_a_clean_stop_that_can_be_resumed(
    run_folder: Path, fresh: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C exits with 130, the command that goes on, no traceback and nothing half-written; the last run ends as if
    never stopped."""
    render, due = RunView.__call__, iter(CTRL_C_AT.items())
    for where, matches in due:
        pressed: list[Event] = []

        def press(self: RunView, event: Event) -> None:
            if matches(event) and not pressed:  # noqa: B023
                pressed.append(event)  # noqa: B023
                os.kill(os.getpid(), signal.SIGINT)
            render(self, event)

        monkeypatch.setattr(RunView, "__call__", press)
        outcome = fresh.run()
        assert pressed, where
        assert outcome.code == 130, (where, outcome.err)
        *_, command, last = outcome.err.splitlines()
        assert last == "interrupted", where
        assert command.startswith("to go on: spec run smoke " if "smoke-" not in command else "to go on: spec run /")
        assert "Traceback" not in outcome.err
        assert fresh.half_written() == [], where
        assert not list(fresh.runs.rglob("bench/*"))
    monkeypatch.setattr(RunView, "__call__", render)
    assert fresh.run().code == 0
    assert fresh.weights() == (run_folder / WEIGHTS).read_bytes()
