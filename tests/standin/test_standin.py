"""What a GPU would refuse, shown without one: every algorithm trains, replays and decodes on a stand-in for CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A compiler and a process of its own: half a minute.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
# bf16 products of another order of operations; 0.9% was the most that was seen.
GRADIENTS = 0.02
ANSWER = 8

Parts = dict[str, Any]


def child(hooks: Path, script: str, *arguments: object) -> dict[str, Any]:
    """Runs one of this folder's scripts beside the hooks, and returns what it reports."""
    environment = {**os.environ, "LD_PRELOAD": str(hooks), "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcome(hooks: Path) -> dict[str, Any]:
    """What happens to every algorithm, with a reduced and with the whole vocabulary."""
    return child(hooks, "algorithms.py")


@pytest.fixture(scope="module")
def cases(outcome: dict[str, Any]) -> dict[str, Parts]:
    """The parts of each case of an algorithm and a vocabulary."""
    return {case: parts for case, parts in outcome["cases"].items() if case != "before Ampere"}


def others(cases: dict[str, Parts], part: str, is_right: Any) -> dict[str, Any]:
    """The cases in which a part did not end as it must."""
    return {case: parts[part] for case, parts in cases.items() if not is_right(parts[part])}


def test_every_algorithm_trains(cases):
    """An update in bf16 mixes no devices, uses nothing that strict determinism refuses, and has the CPU's gradients."""
    assert others(cases, "train", lambda gap: isinstance(gap, float) and gap < GRADIENTS) == {}


def test_an_update_reads_the_device_once(cases):
    """Nothing in forward and backward waits for the device; loss, metrics and norm are read together at the end."""
    read = "tolist at training/update.py"
    assert others(cases, "train waits", lambda waits: [line.rpartition(":")[0] for line in waits] == [read]) == {}
    assert others(cases, "train waits", lambda waits: sum(waits.values()) == 1) == {}


@pytest.mark.parametrize("part", ["evaluate", "replay, T=0.0", "replay, T=1.0"])
def test_every_algorithm_replays(cases, part):
    """Replay gives an acceptance length, also in the precision and under the strictness of an evaluation."""
    assert others(cases, part, lambda length: isinstance(length, float) and length >= 1) == {}


def test_every_algorithm_decodes(cases, outcome):
    """Live decoding emits the verifier's own tokens at T = 0, and as many when it samples."""
    assert others(cases, "decode, T=0.0", lambda tokens: tokens == outcome["own answer"]) == {}
    assert others(cases, "decode, T=1.0", lambda tokens: isinstance(tokens, list) and len(tokens) == ANSWER) == {}


def test_an_evaluation_computes_as_its_verifier_does(cases, outcome):
    """Beside a bf16 verifier a GPU evaluates in bf16; one without bf16 products does not, and needs no flash kernel."""
    assert others(cases, "evaluate in 16 bits", lambda on: on is True) == {}
    old = outcome["cases"]["before Ampere"]
    assert old["evaluate in 16 bits"] is False
    assert old["replay, T=0.0"] >= 1


def test_verifiers_of_other_kinds_capture_and_decode(outcome):
    """Experts and sliding windows give the CPU's states, beside a training that is strict, and the CPU's tokens."""
    for family, parts in outcome["verifiers"].items():
        assert isinstance(parts["capture"], float), f"{family}: {parts['capture']}"
        assert parts["capture"] < 1e-3, family
        assert parts["decode"] == parts["expected"], family


@pytest.mark.parametrize("states", [('"online"', '"float32"'), ('"cached"', '"fp8"')])
def test_the_pipeline_runs_to_its_table(hooks, tmp_path, states):
    """States, updates, evaluations, checkpoints, export and bench, where replay and live decoding agree."""
    steps = ("schedule.max_steps=4", "schedule.evaluate_every=2", "schedule.checkpoint_every=2")
    where = (f"data.hidden_states={states[0]}", f"data.states_dtype={states[1]}")
    result = child(hooks, "pipeline.py", tmp_path, "smoke", *where, *steps)
    assert result["device"] == "cuda:0"
    assert result["agrees"]
    assert not any(event.startswith("WarningEvent") for event in result["events"]), result["events"]
