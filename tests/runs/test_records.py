"""The time that a run's stages took, read from its own log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speculators.cost.history import _costs_of_run
from speculators.events import StageEvent, StepEvent
from speculators.runs.log import LoggedEvent, RunLog
from speculators.runs.places import Places, RunFolder
from speculators.runs.records import RunRecord


def stage(time: float, name: str, status: str, seconds: float = 0.0) -> LoggedEvent:
    return LoggedEvent(time, StageEvent(stage=name, status=status, seconds=seconds))


def step(time: float) -> LoggedEvent:
    return LoggedEvent(time, update(1))


def update(number: int, loss: float = 1.0) -> StepEvent:
    return StepEvent(
        step=number,
        total_steps=9,
        epoch=0,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=512,
        tokens_per_second=100.0,
        seconds_left=1.0,
    )


def stage_seconds(events: Sequence[LoggedEvent]) -> dict[str, float]:
    return RunLog(tuple(events)).stage_seconds()


def test_the_time_of_a_stage_includes_its_interrupted_launches() -> None:
    """The time up to the last event of each launch counts, but neither the hours between launches nor other stages."""
    first = [stage(100, "capture", "start"), stage(130, "capture", "done", 30), stage(130, "train", "start"), step(190)]
    second = [stage(9000, "capture", "skip"), stage(9001, "train", "start"), step(9021)]
    third = [stage(20000, "capture", "skip"), stage(20002, "train", "start"), stage(20012, "train", "done", 10)]
    assert stage_seconds([*first, *second, *third]) == {"capture": 30, "train": pytest.approx(60 + 20 + 10)}


def test_the_time_of_a_repeated_stage_is_that_of_its_last_launch() -> None:
    """A repeated stage, such as another benchmark, reports its last time; one that never ended reports none."""
    events = [stage(0, "bench", "start"), stage(40, "bench", "done", 40), stage(50, "bench", "start")]
    assert stage_seconds([*events, stage(57, "bench", "done", 7), stage(60, "train", "start"), step(70)]) == {
        "bench": 7
    }


def test_the_plug_in_of_an_unrelated_run_is_not_imported(tmp_path: Path) -> None:
    """Estimating the time of a plan reads other runs without running their code."""
    (tmp_path / "somebodys.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    recipe = 'format = 1\nname = "old"\nversion = "1.0.0"\nextends = "smoke"\n'
    (tmp_path / "recipe.toml").write_text(recipe + '[algorithm]\nname = "somebodys"\nmodule = "somebodys"\n')
    (tmp_path / "plan.json").write_text(json.dumps({"recipe": {"algorithm": {"module": "somebodys"}}}))
    empty: dict[str, Any] = {"fingerprints": {}, "seconds": {}, "tokens_per_second": {}, "tokens": {}}
    old = RunRecord(folder=RunFolder(tmp_path), device="cpu", coverage=None, **empty)
    plan: Any = SimpleNamespace(recipe=SimpleNamespace(algorithm=SimpleNamespace(module=None)))
    assert _costs_of_run(old, plan, Places()) is None
    assert not (tmp_path / "ran").exists()
