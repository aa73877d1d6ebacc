"""`[tracking]` also sends the curves elsewhere, and the run stays the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import WEIGHTS, Spec

from speculators.diff.compare import value_changes
from speculators.diff.side import DiffSide
from speculators.facts import VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan
from speculators.tracking import sinks
from speculators.tracking.sinks import TrackedRun

TENSORBOARD = ("--set", 'tracking.sinks=["tensorboard"]')


def test_tracking_does_not_change_the_meaning_of_a_recipe(tiny_verifier: Path) -> None:
    """No fingerprint contains it, and no comparison reports it."""
    facts = VerifierFacts.read(tiny_verifier / "config.json")
    plain, tracked = (load_recipe("smoke", sets) for sets in ([], ['tracking.sinks=["wandb"]']))
    assert make_plan(plain, facts).stages == make_plan(tracked, facts).stages
    assert value_changes(DiffSide.of_recipe("a", plain), DiffSide.of_recipe("b", tracked)) == []


def test_an_unknown_sink_is_a_bad_recipe(spec: Spec) -> None:
    """The error suggests the nearest name."""
    outcome = spec("validate", "smoke", "--set", 'tracking.sinks=["tensorbord"]')
    assert outcome.code == 2
    assert 'tracking.sinks: must be one of "tensorboard", "wandb", "mlflow", got "tensorbord"' in outcome.err
    assert "did you mean 'tensorboard'?" in outcome.err


def test_a_sink_that_is_not_installed_stops_the_run_before_it_begins(
    fresh: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is 2, the error names the extra to install, and no folder is made."""
    monkeypatch.setattr(sinks, "_is_installed", lambda package: False)
    outcome = fresh.run(*TENSORBOARD)
    assert outcome.code == 2
    assert "pip install 'spec-recipes[tensorboard]'" in outcome.err
    assert not fresh.runs.exists()


def test_a_tracked_run_is_the_same_run(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """Name and weights are the same, and TensorBoard's file has every curve; a second call opens no sink."""
    pytest.importorskip("tensorboard", reason="pip install 'spec-recipes[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ("run", "smoke", "--runs", tmp_path, *TENSORBOARD)
    outcome = spec(*arguments)
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err
    folder = tmp_path / run_folder.name
    assert (folder / WEIGHTS).read_bytes() == (run_folder / WEIGHTS).read_bytes()
    curves = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    curves.Reload()
    assert [event.step for event in curves.Tensors("train/loss")] == list(range(1, 9))
    assert [event.step for event in curves.Tensors("eval/tau")] == [4, 8]
    assert "bench/quickstart/K=3/T=0/tau" in curves.Tags()["tensors"]
    files = list((folder / "tensorboard").iterdir())
    assert spec(*arguments).code == 0
    assert list((folder / "tensorboard").iterdir()) == files


def test_a_sink_that_fails_does_not_fail_the_run(
    spec: Spec, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning is printed and logged."""

    def fail(subject: TrackedRun) -> sinks.Sink:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("speculators.pipeline.run.OPEN", {"tensorboard": fail})
    outcome = spec("run", "smoke", "--runs", tmp_path, *TENSORBOARD, "--set", "benchmark.suites=[]")
    assert outcome.code == 0, outcome.err
    (warning,) = [line for line in outcome.err.splitlines() if line.startswith("warning: tensorboard")]
    assert "failed and receives nothing more: ConnectionError: no route to host; the run continues" in warning
    (log,) = tmp_path.glob("*/events.jsonl")
    assert log.read_text().count("no route to host") == 1
