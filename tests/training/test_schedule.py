"""The learning rate's factor and the calendar of a run."""

from __future__ import annotations

import itertools
import math

import pytest

from speculators.recipe.schema import LearningRate
from speculators.training.schedule import due, factor


def curve(total=100, **fields):
    return [factor(step, total, LearningRate(**fields)) for step in range(total)]


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd", "constant"])
def test_warm_up_rises_linearly_to_one_and_no_update_is_wasted_at_zero(shape):
    """Warm-up is linear, its last update runs at the peak, and with floor 0 every update still has a rate above 0."""
    found = curve(shape=shape, warmup=0.1)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(found) == 1.0
    assert min(found) > 0


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
def test_every_shape_but_constant_falls_steadily_towards_its_floor(shape):
    """After the warm-up the factor never rises, and its continuation to the step after the last is the floor."""
    section = LearningRate(shape=shape, warmup=0.1, floor=0.25)
    found = [factor(step, 100, section) for step in range(9, 100)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert factor(100, 100, section) == pytest.approx(0.25)


def test_shapes_at_the_middle_of_the_way():
    """Half way down, linear and cosine are at one half, wsd has not begun; a quarter down, cosine is above linear."""
    assert curve(shape="linear", warmup=0)[50] == pytest.approx(0.5)
    assert curve(shape="cosine", warmup=0)[50] == pytest.approx(0.5)
    assert curve(shape="cosine", warmup=0)[25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert curve(shape="wsd", warmup=0, decay=0.2)[80] == 1.0
    assert curve(shape="wsd", warmup=0, decay=0.2)[90] == pytest.approx(0.5)


def test_degenerate_lengths_do_not_divide_by_zero():
    """One update, all warm-up, or no decay at all are schedules too."""
    assert factor(0, 1, LearningRate(warmup=0.0)) == 1.0
    assert curve(shape="cosine", warmup=1.0)[-1] == 1.0
    assert curve(shape="wsd", warmup=0.0, decay=0.0) == [1.0] * 100


def due_steps(every: int | str, total: int) -> list[int]:
    return [step for step in range(1, total + 1) if due(step, every, total)]


def test_a_share_of_the_run_is_due_as_often_as_it_fits_and_the_end_is_its_last():
    """Also where the updates cannot be divided evenly; shares of less than an update are due at each."""
    assert due_steps("25%", 597) == [150, 299, 448, 597]
    assert due_steps("10%", 240) == list(range(24, 241, 24))
    assert due_steps("2.5%", 10) == list(range(1, 11))
    assert due_steps("30%", 10) == [3, 6, 9, 10]


def test_an_interval_in_updates_is_due_at_its_multiples_and_at_the_end():
    """So that a run never ends unmeasured."""
    assert due_steps(7, 15) == [7, 14, 15]
    assert due_steps(4, 10) == [4, 8, 10]
