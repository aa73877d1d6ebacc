"""Differences over seeds and prompts: the interval covers the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.ablation.statistics import LEVEL, TauDifference, difference, seed_variance
from speculators.bench.statistics import difference_half_width, linearised, student_quantile

SEEDS, PROMPTS = 3, 40
# The true tau of each arm; the base is the first.
TRUE = np.array([1.70, 1.70, 1.72, 1.75, 1.65])


def measured(rng: np.random.Generator, *, by_seed: float = 0.02, by_prompt: float = 0.06, both: float = 0.1):
    """Draws prompts and seeds, and measures all arms on them: sums of tokens and rounds, [arms, seeds, prompts, 2].

    Args:
        by_seed, by_prompt, both: standard deviations of an arm's tau between seeds, prompts, and pairs of them. Beside
            these, all arms share what a seed and what a prompt does.
    """
    arms = len(TRUE)
    rounds = rng.poisson(40, size=PROMPTS) + 1.0
    shared = rng.normal(0, 0.03, (1, SEEDS, 1)) + rng.normal(0, 0.3, (1, 1, PROMPTS))
    own = rng.normal(0, by_seed, (arms, SEEDS, 1)) + rng.normal(0, by_prompt, (arms, 1, PROMPTS))
    tau = TRUE[:, None, None] + shared + own + rng.normal(0, both, (arms, SEEDS, PROMPTS))
    return np.stack([tau * rounds, np.broadcast_to(rounds, tau.shape)], axis=-1)


def compared(sums: np.ndarray) -> list[TauDifference]:
    pooled = seed_variance(sums)
    differences = [difference(sums[0], variant, pooled) for variant in sums[1:]]
    assert all(each is not None for each in differences)
    return differences


def covers(each: TauDifference, truth: float) -> bool:
    return each.low <= truth <= each.high


@pytest.mark.parametrize(
    ("spreads", "too_narrow", "too_wide"),
    [
        # Retrained arms differ from seed to seed: an interval over prompts alone forgets most of that.
        ({"by_seed": 0.02}, True, False),
        # Seeds move single prompts, but nothing beyond: the sum of both parts would count that twice.
        ({"by_seed": 0.0, "by_prompt": 0.0}, False, True),
    ],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(
    spreads: dict[str, float], too_narrow: bool, too_wide: bool
) -> None:
    """Over 150 experiments of four variants, 95% intervals hold the true difference in 93 to 97%: three standard errors
    are 1.8% if variants were independent, and they share the base. Other ways to compute it are off by more."""
    rng = np.random.default_rng(0)
    hits, over_prompts, summed = [], [], []
    for _ in range(150):
        sums = measured(rng, **spreads)
        for variant, each in enumerate(compared(sums), start=1):
            truth = TRUE[variant] - TRUE[0]
            hits.append(covers(each, truth))
            parts = np.mean([linearised(sums[variant, s]) - linearised(sums[0, s]) for s in range(SEEDS)], axis=0)
            error = parts.std(ddof=1) / PROMPTS**0.5
            over_prompts.append(abs(each.mean - truth) <= 2.02 * error)
            both = (error**2 + each.seed_error**2) ** 0.5
            summed.append(abs(each.mean - truth) <= (each.high - each.mean) * both / each_error(each))
    assert 0.93 <= np.mean(hits) <= 0.97
    assert (np.mean(over_prompts) < 0.90) == too_narrow
    assert (np.mean(summed) > 0.98) == too_wide


def each_error(each: TauDifference) -> float:
    return (each.seed_error**2 + each.prompt_error**2) ** 0.5


def test_what_a_seed_does_to_all_arms_cancels() -> None:
    """An easier seed raises every tau, and no difference nor its interval."""
    sums = measured(np.random.default_rng(1))
    easier = sums.copy()
    easier[:, 1, :, 0] += 0.2 * easier[:, 1, :, 1]
    for one, other in zip(compared(sums), compared(easier), strict=True):
        assert (other.mean, other.low, other.high) == pytest.approx((one.mean, one.low, one.high))


def test_one_variant_has_the_variance_of_a_paired_test() -> None:
    """With two arms the pooled variance is half that of the differences between them, with as many degrees."""
    sums = measured(np.random.default_rng(2))[:2]
    taus = sums[..., 0].sum(axis=2) / sums[..., 1].sum(axis=2)
    pooled = seed_variance(sums)
    assert pooled.variance == pytest.approx((taus[1] - taus[0]).var(ddof=1) / 2)
    assert pooled.freedom == SEEDS - 1
    assert seed_variance(measured(np.random.default_rng(2))).freedom == (len(TRUE) - 1) * (SEEDS - 1)


def test_one_seed_gives_an_interval_over_prompts_alone() -> None:
    """It is that of a comparison of two runs."""
    sums = measured(np.random.default_rng(3))[:, :1]
    for variant, each in enumerate(compared(sums), start=1):
        half = difference_half_width(sums[0, 0], sums[variant, 0], level=LEVEL)
        assert (each.mean - each.low, each.high - each.mean) == pytest.approx((half, half))
        assert not each.over_seeds


def test_a_run_that_failed_takes_only_its_seed_away() -> None:
    """The variant is compared over the other seeds, and the others are as they would be without it."""
    sums = [list(arm) for arm in measured(np.random.default_rng(4))]
    sums[2][0] = None
    pooled = seed_variance(sums)
    assert pooled.freedom == (len(TRUE) - 1) * (SEEDS - 1) - 1
    whole, less = (difference(sums[0], sums[arm], pooled) for arm in (1, 2))
    assert (whole.seeds, less.seeds) == (SEEDS, SEEDS - 1)
    assert less.seed_error == pytest.approx(whole.seed_error * (SEEDS / (SEEDS - 1)) ** 0.5)
    taus = [arm[1:, :, 0].sum(axis=1) / arm[1:, :, 1].sum(axis=1) for arm in measured(np.random.default_rng(4))]
    assert less.mean == pytest.approx((taus[2] - taus[0]).mean())


def test_nothing_is_compared_where_nothing_is_paired() -> None:
    """A base that failed with every seed leaves no difference, and one prompt no interval."""
    sums = measured(np.random.default_rng(5))
    missing = [None] * SEEDS
    assert difference(missing, sums[1], seed_variance([missing, *sums[1:]])) is None
    assert difference(sums[0, :, :1], sums[1, :, :1], seed_variance(sums[:, :, :1])) is None
    assert seed_variance([missing, missing]).freedom == 0


def test_rounding_is_no_difference() -> None:
    """A variant whose rounds are the base's up to the last bit has no difference that could hold."""
    sums = measured(np.random.default_rng(7), by_seed=0.0, by_prompt=0.0, both=0.0)
    sums[:] = sums[0]
    sums[1, ..., 0] *= 1 + 1e-15
    (same, *_) = compared(sums)
    assert same.p == 1
    assert same.high - same.low < 1e-9


def test_more_seeds_and_variants_narrow_the_interval() -> None:
    """Two seeds of one variant leave one degree of freedom, whose quantile is 12.7: it pays to add some."""
    assert student_quantile(0.975, 1) == pytest.approx(12.706, rel=1e-3)
    sums = measured(np.random.default_rng(6), by_seed=0.05, by_prompt=0.0, both=0.0)
    alone, among_others = compared(sums[:2, :2])[0], compared(sums[:, :2])[0]
    assert alone.freedom == pytest.approx(1)
    assert among_others.freedom == pytest.approx(4)
