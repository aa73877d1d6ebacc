"""The comparison behind every diagnosis: its power and its rate of false alarms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speculators.doctor.trials import COMPARISONS, FALSE_ALARM, LEVEL, UNITS, Trial, compare, sign_flip, units


def trial(*tables: np.ndarray) -> Trial:
    return Trial(tuple(tables), (), torch.empty(0))


def drafts(rng: np.random.Generator, rate: float, answers: int = 16, places: int = 60) -> Trial:
    return trial(*((rng.random((places, 3)) < rate).astype(float) for _ in range(answers)))


def test_the_sign_flip_test_is_exact_on_a_hand_counted_case() -> None:
    """The eight signings of 1, 2, 3 have the largest sums 6 and 4: p of 6 is 1/8, p of 4 is 2/8."""
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / 8)
    assert sign_flip(np.array([-1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip(np.zeros(5)) == 1.0


@pytest.mark.parametrize("size", [13, 40])
def test_chance_stays_below_the_level_that_is_asked_for(size: int) -> None:
    """With counted and drawn signs, 5% of null examinations fall below 0.05, within three standard errors."""
    rng = np.random.default_rng(0)
    count = 60 if size > 14 else 2000
    below = np.mean([sign_flip(rng.normal(size=size)) <= 0.05 for _ in range(count)])
    assert below <= 0.05 + 3 * (0.05 * 0.95 / count) ** 0.5


def test_the_level_of_one_comparison_covers_all() -> None:
    """The level follows Bonferroni, and the least number of units can reach it."""
    assert pytest.approx(FALSE_ALARM) == LEVEL * COMPARISONS
    assert 2.0**-UNITS <= LEVEL


def test_equal_drafts_are_never_better() -> None:
    """Two drafts of equal quality raise no alarm in a hundred pairs, in either direction."""
    rng = np.random.default_rng(1)
    pairs = [compare(drafts(rng, 0.5), drafts(rng, 0.5)) for _ in range(100)]
    assert not any(pair.better or pair.worse for pair in pairs)


def test_a_better_draft_counts_and_a_slightly_better_one_does_not() -> None:
    """0.5 against 0.3 counts; a certain gain below 5% of the accepted drafts does not."""
    rng = np.random.default_rng(2)
    low, high = drafts(rng, 0.3), drafts(rng, 0.5)
    assert compare(low, high).better
    assert compare(high, low).worse
    base = np.ones((100, 1))
    base[:10] = 0
    less = base.copy()
    less[10:13] = 0
    nearly = compare(trial(*[less] * 13), trial(*[base] * 13))
    assert nearly.p <= LEVEL
    assert not nearly.better


def test_few_answers_are_cut_into_stretches() -> None:
    """Three answers give at least twelve units; thirteen give thirteen."""
    assert len(units([np.ones(30)] * 3)) >= UNITS
    assert len(units([np.ones(30)] * 13)) == 13
