"""Intervals: bootstrap over prompts of a ratio of sums."""

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
        labels, index = np.unique(np.asarray(groups), return_inverse=True)
        numerators = np.bincount(index, weights=numerators, minlength=len(labels))
        denominators = np.bincount(index, weights=denominators, minlength=len(labels))
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
