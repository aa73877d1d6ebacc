"""Intervals over prompts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from speculators.bench.statistics import (
    bootstrap_difference,
    bootstrap_ratio,
    difference_half_width,
    student_chance,
    student_quantile,
)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Over 200 simulated suites a 95% interval holds the true ratio in 90 to 99% (n is finite: bootstrap is a little
    narrow)."""
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        rounds = random.poisson(40, size=60) + 1.0
        tokens = rounds * (1.5 + 0.3 * random.standard_normal(60))
        low, high = bootstrap_ratio(tokens, rounds, seed=trial)
        hits += low <= 1.5 <= high
    assert 180 <= hits <= 198


def test_the_same_seed_gives_the_same_interval_and_another_another():
    """The interval depends on the seed and on nothing else."""
    tokens, rounds = np.arange(10.0) + 5, np.arange(10.0)[::-1] + 3
    assert bootstrap_ratio(tokens, rounds, seed=1) == bootstrap_ratio(tokens, rounds, seed=1)
    assert bootstrap_ratio(tokens, rounds, seed=1) != bootstrap_ratio(tokens, rounds, seed=2)


def test_a_higher_level_is_wider():
    """The 99% interval contains the 95% interval."""
    tokens, rounds = np.array([3.0, 9.0, 4.0, 8.0]), np.array([2.0, 3.0, 3.0, 4.0])
    low, high = bootstrap_ratio(tokens, rounds, level=0.95)
    lower, higher = bootstrap_ratio(tokens, rounds, level=0.99)
    assert lower <= low <= tokens.sum() / rounds.sum() <= high <= higher


def test_turns_of_a_prompt_are_drawn_together():
    """Two equal turns of each prompt carry no more information than one."""
    tokens, rounds = np.array([3.0, 9.0, 4.0, 8.0]), np.array([2.0, 3.0, 3.0, 4.0])
    names = ["a", "b", "c", "d"]
    single = bootstrap_ratio(tokens, rounds, groups=names)
    double = bootstrap_ratio(np.tile(tokens, 2), np.tile(rounds, 2), groups=names * 2)
    assert double == pytest.approx(single)


def test_one_prompt_has_no_spread_and_none_has_no_interval():
    """One prompt gives an interval without width, and no prompts give NaN."""
    assert bootstrap_ratio(np.array([6.0]), np.array([4.0])) == (1.5, 1.5)
    assert np.isnan(bootstrap_ratio(np.array([]), np.array([]))).all()
    assert np.isnan(bootstrap_ratio(np.array([0.0]), np.array([0.0]))).all()


@pytest.mark.parametrize("freedom", [5, 7, 79])
@pytest.mark.parametrize("probability", [0.975, 0.995, 0.9999])
def test_students_quantiles_are_scipys(freedom, probability):
    """They agree with SciPy's within a thousandth."""
    assert student_quantile(probability, freedom) == pytest.approx(student.ppf(probability, freedom), rel=1e-3)


@pytest.mark.parametrize("freedom", [1, 2.5, 16])
@pytest.mark.parametrize("statistic", [0.0, -0.7, 2.3, 5.0])
def test_students_chances_are_scipys(freedom, statistic):
    """Two-sided p values agree with SciPy's within a hundredth, or 1e-4 near 0, whatever the degrees of freedom."""
    expected = 2 * student.sf(abs(statistic), freedom)
    assert student_chance(statistic, freedom) == pytest.approx(expected, rel=0.01, abs=1e-4)


def _walk(random, rates, lengths):
    """Tokens and rounds of responses of these lengths, whose drafts are accepted at these rates, at K = 5."""
    emitted = np.minimum(6, random.geometric(1 - rates[:, None], size=(len(rates), 64))).cumsum(axis=1)
    return np.stack([lengths.astype(float), 1.0 + (emitted < lengths[:, None]).sum(axis=1)], axis=1)


def test_the_difference_of_six_prompts_is_covered_as_often_as_it_says():
    """Two decodes of the same six prompts differ by chance alone: about 1% of 1000 pairs lie outside a 99% interval (20
    are three deviations more). Resampling so few prompts would reject far more often."""
    random = np.random.default_rng(0)
    outside = resampled = 0
    for seed in range(1000):
        rates, lengths = random.beta(4, 5, size=6), random.integers(20, 64, size=6)
        first, second = (_walk(random, np.clip(rates + random.normal(0, 0.1, 6), 0, 0.9), lengths) for _ in range(2))
        gap = second[:, 0].sum() / second[:, 1].sum() - first[:, 0].sum() / first[:, 1].sum()
        outside += abs(gap) > difference_half_width(first, second, level=0.99)
        if seed < 200:
            low, high = bootstrap_difference(first, second, level=0.99)
            resampled += not low <= 0 <= high
    assert outside <= 20
    assert resampled >= 8
