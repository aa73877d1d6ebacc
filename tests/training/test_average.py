"""The moving average of the weights: its definition, where it is used, and that training does not notice it."""

from __future__ import annotations

import pytest
import torch
from training_toy import MUON, build, exported_weights, make_job, run, weights

from speculators.recipe.schema import ScheduleSection
from speculators.training import snapshot
from speculators.training.checkpoint import latest

EMA = 0.3


def seen_at_evaluations(model, job):
    """Trains, and returns the weights before training and those that each evaluation saw."""
    seen = [weights(model)]
    list(run(model, job, evaluate=lambda: (1.0, seen.append(weights(model)) or {})))
    return seen


def test_the_average_is_evaluated_and_exported_and_training_goes_on_as_without_it(tmp_path):
    """Evaluation and export take d average + (1 - d) weights, d = min(ema, (1 + t) / (10 + t)).

    The weights that are trained keep the bits of a run without an average.
    """
    plain, averaged = build(), build()
    trained = seen_at_evaluations(plain, make_job(tmp_path / "plain", optimizer=MUON, evaluate_every=1))
    seen = seen_at_evaluations(averaged, make_job(tmp_path / "ema", optimizer=MUON, evaluate_every=1, ema=EMA))
    exported, moved = exported_weights(tmp_path / "ema"), 0.0
    for name in exported:
        average = trained[0][name].double()
        for step, after in enumerate(trained[1:]):
            decay = min(EMA, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * after[name].double()
            # float32 against float64.
            torch.testing.assert_close(seen[step + 1][name].double(), average, rtol=0, atol=1e-6)
            moved = max(moved, float((average - after[name]).abs().max()))
        assert torch.equal(plain.state_dict()[name], averaged.state_dict()[name])
        assert torch.equal(exported[name], seen[-1][name])
    # The decay was limited first and then reached, and the average is far from the weights.
    assert (1 + 0) / (10 + 0) < EMA < (1 + 5) / (10 + 5)
    assert moved > 1e-3


def test_an_evaluation_that_fails_leaves_the_trained_weights(tmp_path):
    """An error in an evaluation does not leave the average in the place of the weights."""
    plain, averaged = build(), build()
    list(run(plain, make_job(tmp_path / "plain")))

    def fail():
        raise ValueError("no responses")

    with pytest.raises(ValueError, match="no responses"):
        list(run(averaged, make_job(tmp_path / "ema", evaluate_every=6, ema=EMA), evaluate=fail))
    assert all(torch.equal(value, weights(averaged)[name]) for name, value in weights(plain).items())


def test_without_a_decay_nothing_is_averaged_or_stored(tmp_path):
    """A checkpoint without an average has no tensor of it, and its weights are exported."""
    model = build()
    list(run(model, make_job(tmp_path)))
    assert not [name for name in snapshot.names(latest(tmp_path)) if "average" in name]
    assert all(torch.equal(value, weights(model)[name]) for name, value in exported_weights(tmp_path).items())


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5])
def test_a_decay_lies_between_zero_and_one(ema):
    """At 0 the average is the weights, at 1 it never moves: both are refused."""
    with pytest.raises(ValueError, match="above 0 and below 1"):
        ScheduleSection(ema=ema)
