"""Bootstrap over prompts."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.bench.statistics import bootstrap_ratio


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
    """Results are reproducible."""
    tokens, rounds = np.arange(10.0) + 5, np.arange(10.0)[::-1] + 3
    assert bootstrap_ratio(tokens, rounds, seed=1) == bootstrap_ratio(tokens, rounds, seed=1)
    assert bootstrap_ratio(tokens, rounds, seed=1) != bootstrap_ratio(tokens, rounds, seed=2)


def test_a_higher_level_is_wider():
    """99% holds 95%."""
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
    """Nothing is invented."""
    assert bootstrap_ratio(np.array([6.0]), np.array([4.0])) == (1.5, 1.5)
    assert np.isnan(bootstrap_ratio(np.array([]), np.array([]))).all()
    assert np.isnan(bootstrap_ratio(np.array([0.0]), np.array([0.0]))).all()
