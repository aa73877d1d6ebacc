"""What a run's own log says that its stages took."""

from __future__ import annotations

from typing import Any

import pytest

from speculators.pipeline.records import stage_seconds


def stage(time: float, name: str, status: str, seconds: float = 0.0) -> dict[str, Any]:
    return {"time": time, "event": "StageEvent", "stage": name, "status": status, "detail": "", "seconds": seconds}


def step(time: float) -> dict[str, Any]:
    return {"time": time, "event": "StepEvent"}


def test_a_stage_took_what_its_interrupted_launches_worked_too() -> None:
    """Until the last that each told; not the hours between two launches, nor the other stages."""
    first = [stage(100, "capture", "start"), stage(130, "capture", "done", 30), stage(130, "train", "start"), step(190)]
    second = [stage(9000, "capture", "skip"), stage(9001, "train", "start"), step(9021)]
    third = [stage(20000, "capture", "skip"), stage(20002, "train", "start"), stage(20012, "train", "done", 10)]
    assert stage_seconds([*first, *second, *third]) == {"capture": 30, "train": pytest.approx(60 + 20 + 10)}


def test_a_stage_that_was_made_again_took_what_it_did_last() -> None:
    """As a benchmark of other settings; of one that never ended nothing is known."""
    events = [stage(0, "bench", "start"), stage(40, "bench", "done", 40), stage(50, "bench", "start")]
    assert stage_seconds([*events, stage(57, "bench", "done", 7), stage(60, "train", "start"), step(70)]) == {
        "bench": 7
    }
