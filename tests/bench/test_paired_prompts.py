"""Differences of acceptance length over the same prompts."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.bench.paired import PairedDifference, paired_difference, prompts_needed
from speculators.bench.statistics import bootstrap_difference, bootstrap_ratio


def sums(tau: np.ndarray, rounds: float = 30.0) -> dict[str, tuple[float, float]]:
    """Tokens and rounds of prompts with these acceptance lengths."""
    return {str(index): (float(each * rounds), rounds) for index, each in enumerate(tau)}


def difference(before: np.ndarray, after: np.ndarray) -> PairedDifference:
    paired = paired_difference(sums(before), sums(after))
    assert paired is not None
    return paired


def test_a_difference_that_all_prompts_share_is_shown_where_single_intervals_overlap() -> None:
    """Prompts differ far more than the two drafters do on each of them: pairing removes that."""
    random = np.random.default_rng(0)
    before = random.uniform(1.2, 2.6, 40)
    after = before + 0.05 + random.normal(0, 0.05, 40)
    (_, high), (low, _) = (bootstrap_ratio(30 * tau, np.full(40, 30.0)) for tau in (before, after))
    paired = difference(before, after)
    assert low < high
    assert paired.shown
    assert paired.low < paired.mean < paired.high
    assert paired.mean == pytest.approx(after.mean() - before.mean())


def test_equal_drafters_differ_by_nothing() -> None:
    """Rounding must not pass for a difference."""
    tau = np.random.default_rng(0).uniform(1, 3, 20)
    paired = difference(tau, tau + 1e-14)
    assert not paired.shown
    assert paired.mean == pytest.approx(0, abs=1e-12)
    assert paired.prompts_for_share == 2


@pytest.mark.parametrize("prompts", [5, 40])
def test_chance_alone_is_shown_as_a_difference_as_rarely_as_it_says(prompts: int) -> None:
    """In about 5% of 600 pairs (45 are three deviations more), also with few prompts, which resampling alone would
    find different far too often."""
    random = np.random.default_rng(0)
    shown = resampled = 0
    for _ in range(600):
        before, after = random.uniform(1.2, 2.6, prompts) + random.normal(0, 0.2, (2, prompts))
        shown += difference(before, after).shown
        low, high = bootstrap_difference(*(np.array(list(sums(tau).values())) for tau in (before, after)))
        resampled += not low <= 0 <= high
    assert shown <= 45
    if prompts == 5:
        assert resampled > 70


def test_the_number_of_prompts_shows_the_difference_as_often_as_it_says() -> None:
    """With deviations of 0.2 by prompt, 2% of a tau of 2 need 196 prompts; then 80% of 200 suites show it, within three
    deviations (8.5%)."""
    random = np.random.default_rng(0)
    pilot = random.uniform(1.5, 2.5, 4000)
    one, other = (np.array(list(sums(tau).values())) for tau in (pilot, pilot + random.normal(0, 0.2, 4000)))
    assert prompts_needed(one, other, difference=0.04) == pytest.approx(196, rel=0.05)
    shown = 0
    for _ in range(200):
        before = random.uniform(1.5, 2.5, 196)
        shown += difference(before, before + random.normal(0.04, 0.2, 196)).shown
    assert 143 <= shown <= 177


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": (4.0, 2.0)}, {"a": (5.0, 2.0)}),
        ({"a": (4.0, 2.0), "b": (3.0, 2.0)}, {"a": (4.0, 2.0), "c": (3.0, 2.0)}),
        ({"a": (4.0, 2.0), "b": (3.0, 2.0)}, {}),
        ({"a": (0.0, 0.0), "b": (0.0, 0.0)}, {"a": (4.0, 2.0), "b": (3.0, 2.0)}),
    ],
    ids=["one prompt", "other prompts", "no counts", "no rounds"],
)
def test_what_cannot_be_paired_has_no_difference(before, after) -> None:
    """One prompt has no spread, and other prompts are no pairs."""
    assert paired_difference(before, after) is None
