"""A list of runs says how far each came, what it changed and its best number, without reading everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.errors import ArtifactError
from speculators.files.locks import is_locked, locked_or_refused
from speculators.runs.places import RunFolder
from speculators.runs.summary import TAIL_BYTES, summaries, summary

PLAN = {"recipe": {"name": "mine", "seed": 3}, "origins": {"seed": "--set", "name": "--set"}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has just begun."""
    folder = tmp_path / "runs" / "mine-11111111"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    return RunFolder(folder)


def log(run: RunFolder, *events: dict[str, Any], time: float = 1.0) -> None:
    with run.events.open("a") as stream:
        stream.writelines(json.dumps({"time": time, **event}) + "\n" for event in events)


def step(number: int) -> dict[str, Any]:
    return {"event": "StepEvent", "step": number, "total_steps": 50}


def setting(k: int, temperature: float, tau: float) -> dict[str, Any]:
    live = {"speed": {"speed_up": tau / 2}}
    return {
        "suite": "s",
        "num_speculative_tokens": k,
        "temperature": temperature,
        "exact": {"tau": tau},
        "live": live,
    }


def test_the_state_says_how_far_training_came(run: RunFolder) -> None:
    """A share of the updates while it trains, and whether a launch is at work; then trained, then measured."""
    assert summary(run).state == "not begun"
    log(run, {"event": "StageEvent", "stage": "capture", "status": "start"})
    assert summary(run).state == "stopped in capture"
    log(run, step(30), step(31))
    assert summary(run).state == "stopped at 62%"
    with locked_or_refused(run.path, ArtifactError("locked")):
        assert (summary(run).state, summary(run).is_running) == ("training 62%", True)
    run.trained.write_text("{}")
    assert summary(run).state == "trained"


def test_the_best_number_is_that_of_the_newest_benchmark(run: RunFolder) -> None:
    """The largest tau at the lowest temperature, with the speed-up of the same setting; a damaged file is skipped."""
    assert summary(run).best is None
    run.bench.mkdir()
    (run.bench / "a.json").write_text(
        json.dumps({"settings": [setting(3, 0.0, 1.6), setting(5, 0.0, 1.8), setting(5, 1.0, 1.9)]})
    )
    run.trained.write_text("{}")
    best = summary(run).best
    assert best is not None
    assert (best.num_speculative_tokens, best.tau, best.speed_up) == (5, 1.8, 0.9)
    assert summary(run).state == "measured"
    (run.bench / "a.json").write_text('{"settings": [{}]}')
    assert summary(run).best is None


def test_changes_are_the_values_of_the_command_line(run: RunFolder) -> None:
    """All but the name, which the list shows anyway."""
    assert summary(run).changes == {"seed": 3}


def test_only_the_end_of_a_long_log_is_read_and_the_last_run_comes_first(run: RunFolder, tmp_path: Path) -> None:
    """Lines before the end, and the one that it cuts, are skipped."""
    log(run, *([step(1)] * (TAIL_BYTES // 20)), step(50), time=7.0)
    assert summary(run).state == "stopped at 100%"
    newer = RunFolder(tmp_path / "runs" / "mine-22222222")
    newer.path.mkdir()
    newer.plan.write_text("damaged")
    log(newer, step(1), time=9.0)
    assert [each.folder.name for each in summaries(tmp_path / "runs")] == ["mine-22222222", "mine-11111111"]


def test_looking_whether_a_run_works_does_not_disturb_it(run: RunFolder) -> None:
    """A free lock is free afterwards, and a run that never worked gets no lock file."""
    assert not is_locked(run.path)
    assert not (run.path / ".lock").exists()
    for _ in range(2):
        with locked_or_refused(run.path, ArtifactError("locked")):
            assert is_locked(run.path)
        assert not is_locked(run.path)
