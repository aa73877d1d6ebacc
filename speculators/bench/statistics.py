"""Intervals over prompts of a ratio of sums: by bootstrap, and by Student's t where prompts are few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 2000


def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of sum(numerators) / sum(denominators) over resampled prompts.

    Args:
        numerators: [n], such as emitted tokens.
        denominators: [n], such as rounds.
        groups: [n] the prompt that each entry belongs to (the turns of one prompt are drawn together); None: its own.
        level: of the interval, between 0 and 1.
        seed: of the draws; the same input gives the same interval.

    Source: Efron 1979; resampling whole prompts because rounds within one are not independent.
    """
    if groups is not None:
        numerators, denominators = by_group(numerators, groups), by_group(denominators, groups)
    size = len(numerators)
    if not size:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), size=DRAWS)
    above, below = drawn @ numerators, drawn @ denominators
    ratios = above[below > 0] / below[below > 0]
    if not len(ratios):
        return float("nan"), float("nan")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return float(low), float(high)


def bootstrap_difference(
    before: np.ndarray, after: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of the difference of two ratios of sums over the same resampled prompts.

    Args:
        before: [n, 2], numerator and denominator of each prompt; `after` likewise, prompt by prompt.
        level: of the interval.
        seed: of the draws.
    """
    size = len(before)
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), size=DRAWS)
    ratios = [(drawn @ side[:, 0]) / np.maximum(drawn @ side[:, 1], 1e-12) for side in (after, before)]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(ratios[0] - ratios[1], [tail, 1.0 - tail])
    return float(low), float(high)


def difference_half_width(before: np.ndarray, after: np.ndarray, *, level: float) -> float:
    """Returns the half width of an interval of the difference of two ratios of sums over the same prompts.

    It holds its level with few prompts, too, where resampling them gives intervals that are much too narrow: each
    ratio is linearised in the sums of its prompts, and the differences of the prompts follow Student's t.

    Args:
        before: [n, 2], numerator and denominator of each prompt, n at least 2; `after` likewise, prompt by prompt.
        level: of the interval.

    Source: Cochran 1977, Sampling Techniques, section 6.4 (variance of a ratio).
    """
    size = len(before)
    parts = [
        (side[:, 0] - side[:, 0].sum() / side[:, 1].sum() * side[:, 1]) / side[:, 1].mean() for side in (before, after)
    ]
    deviation = float(np.std(parts[1] - parts[0], ddof=1))
    return student_quantile((1 + level) / 2, size - 1) * deviation / size**0.5


def student_quantile(probability: float, freedom: int) -> float:
    """Returns the quantile of Student's t with so many degrees of freedom.

    With t = sqrt(freedom) tan(angle) the density of the angle is cos(angle) ** (freedom - 1), which is added up here;
    right to 1e-3 of the quantile down to tails of 1e-4.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    below = np.cumsum(np.cos(angles) ** (freedom - 1))
    return float(freedom**0.5 * np.tan(np.interp(probability, below / below[-1], angles)))


def by_group(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Returns the sums [g] of the values [n] of each group, in order of the groups' names."""
    labels, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values, minlength=len(labels))
