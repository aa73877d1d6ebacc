"""Intervals over prompts for a ratio of sums: by bootstrap, and by Student's t where there are few prompts.

Tau is a ratio of sums (tokens / rounds), not a mean of ratios, and the rounds of one prompt are not independent: so
whole prompts are resampled, with both of their sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
# Ratios that differ by less are the same up to rounding.
ROUNDING = 1e-10


def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Computes the percentile interval of sum(numerators) / sum(denominators) over resampled prompts.

    Args:
        numerators: [n], for example emitted tokens.
        denominators: [n], for example rounds.
        groups: [n] the prompt of each entry (the turns of one prompt are drawn together); None: each entry is its own.
        level: of the interval, between 0 and 1.
        seed: of the draws; the same input gives the same interval.

    Returns:
        Low and high; NaN where there are no entries.

    Source: Efron 1979, Bootstrap Methods: Another Look at the Jackknife.
    """
    if groups is not None:
        numerators, denominators = by_group(numerators, groups), by_group(denominators, groups)
    size = len(numerators)
    if not size:
        return float("nan"), float("nan")
    times = _draws(size, seed)
    above, below = times @ numerators, times @ denominators  # [DRAWS]
    ratios = above[below > 0] / below[below > 0]
    if not len(ratios):
        return float("nan"), float("nan")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return float(low), float(high)


def bootstrap_difference(
    before: np.ndarray, after: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Computes the percentile interval of the difference of two ratios of sums, after - before.

    Both are taken over the same resampled prompts: the spread between prompts, which both share, cancels out.

    Args:
        before: [n, 2], numerator and denominator of each prompt.
        after: [n, 2], the same prompts in the same order.
        level: of the interval.
        seed: of the draws.
    """
    times = _draws(len(before), seed)
    ratios = [(times @ side[:, 0]) / np.maximum(times @ side[:, 1], 1e-12) for side in (after, before)]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(ratios[0] - ratios[1], [tail, 1.0 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=1)
def _draws(size: int, seed: int) -> np.ndarray:
    """Draws how often each of n prompts is taken, [DRAWS, n]: multinomial counts stand for n draws with replacement."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), size=DRAWS)


def difference_half_width(before: np.ndarray, after: np.ndarray, *, level: float) -> float:
    """Computes the half width of an interval of the difference of two ratios of sums over the same prompts.

    It keeps its level with few prompts, too, where the bootstrap gives intervals that are much too narrow. Each ratio
    is `linearised` in the sums of its prompts, and the differences of the d_i between both sides follow Student's t
    with n - 1 degrees of freedom.

    Args:
        before: [n, 2], numerator y and denominator x of each prompt, n at least 2.
        after: [n, 2], the same prompts in the same order.
        level: of the interval.

    Source: Cochran 1977, Sampling Techniques, section 6.4 (variance of a ratio).
    """
    size = len(before)
    deviation = float(np.std(linearised(after) - linearised(before), ddof=1))
    return float(student_quantile((1 + level) / 2, size - 1) * deviation / size**0.5)


def linearised(sums: np.ndarray) -> np.ndarray:
    """Computes how far each prompt moves a ratio of sums, d_i = (y_i - R x_i) / mean(x): [n], with mean 0.

    The ratio R = sum(y) / sum(x) varies over prompts as the mean of R + d_i does.

    Args:
        sums: [n, 2], numerator y and denominator x of each prompt.

    Source: Cochran 1977, Sampling Techniques, section 6.4 (variance of a ratio).
    """
    above, below = sums[:, 0], sums[:, 1]
    return np.asarray((above - above.sum() / below.sum() * below) / below.mean())


def student_quantile(probability: float, freedom: float) -> float:
    """Computes the quantile of Student's t with `freedom` degrees of freedom, at least 1, without SciPy.

    With t = sqrt(freedom) * tan(angle), the density of the angle is proportional to cos(angle) ** (freedom - 1) on a
    finite range, where a plain sum integrates it; accurate to 1e-3 of the quantile down to tails of 1e-4.
    """
    angles, below = _student_angles(freedom)
    return float(freedom**0.5 * np.tan(np.interp(probability, below, angles)))


def student_chance(statistic: float, freedom: float) -> float:
    """Computes the two-sided p value of a Student's t statistic, integrated as in `student_quantile`."""
    angles, below = _student_angles(freedom)
    return float(2 * np.interp(-np.arctan(abs(statistic) / freedom**0.5), angles, below))


@functools.lru_cache(maxsize=4)
def _student_angles(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Tabulates angles and the probabilities below them."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    below = np.cumsum(np.cos(angles) ** (freedom - 1))
    return angles, below / below[-1]


def holm(chances: Sequence[float], *, level: float, weights: np.ndarray | None = None) -> list[bool]:
    """Marks the p values that are significant at a level that holds over all of them together (weighted Holm).

    Args:
        chances: [n] p values.
        level: probability that chance marks any.
        weights: [n] shares of the level, above 0; None for equal ones.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    shares = np.ones(len(chances)) if weights is None else weights
    passed = [False] * len(chances)
    left = float(shares.sum())
    for index in np.argsort(np.asarray(chances) / shares, kind="stable"):
        if chances[index] > level * shares[index] / left:
            break
        passed[int(index)] = True
        left -= float(shares[index])
    return passed


def by_group(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Adds up the values [n] of each group; the sums [g] are in the order of the groups' names."""
    labels, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values, minlength=len(labels))
