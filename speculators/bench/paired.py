"""Differences of acceptance length over the same prompts, with intervals, and how many prompts would show one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import attrs
import numpy as np

from speculators.bench.statistics import ROUNDING, bootstrap_difference, difference_half_width, linearised

LEVEL = 0.95
# A difference worth showing, as a share of the other's acceptance length, and how often it is to be shown.
SHARE = 0.02
POWER = 0.8
# Tokens and rounds of each prompt.
SumsByPrompt = Mapping[str, tuple[float, float]]


@attrs.frozen(kw_only=True)
class PairedDifference:
    """The acceptance length of one drafter minus that of another, both over the same prompts.

    Attributes:
        mean: the difference of the two ratios of sums.
        low, high: of its 95% interval.
        prompts: of both.
        prompts_for_share: prompts that show a difference of `SHARE` of the other's acceptance length; see
            `prompts_needed`.
        shown: whether the interval excludes 0.
    """

    mean: float
    low: float
    high: float
    prompts: int
    prompts_for_share: int
    shown: bool = attrs.field(init=False)

    @shown.default
    def _shown(self) -> bool:
        return self.low > ROUNDING or self.high < -ROUNDING


def paired_difference(before: SumsByPrompt, after: SumsByPrompt, *, seed: int = 0) -> PairedDifference | None:
    """Computes tau after - tau before, with its 95% interval.

    Whole prompts are resampled, the same for both sides (`bootstrap_difference`). Few prompts make that interval too
    narrow, so it is widened to the one by Student's t (`difference_half_width`) where it lies inside.

    Returns:
        None unless both sides have the same prompts, at least two, and rounds.
    """
    if len(before) < 2 or before.keys() != after.keys():
        return None
    # [n, 2], in one order.
    one, other = (np.array([side[prompt] for prompt in before], dtype=np.float64) for side in (before, after))
    if not (one[:, 1].sum() and other[:, 1].sum()):
        return None
    base = float(one[:, 0].sum() / one[:, 1].sum())
    mean = float(other[:, 0].sum() / other[:, 1].sum()) - base
    low, high = bootstrap_difference(one, other, level=LEVEL, seed=seed)
    half = difference_half_width(one, other, level=LEVEL)
    return PairedDifference(
        mean=mean,
        low=min(low, mean - half),
        high=max(high, mean + half),
        prompts=len(before),
        prompts_for_share=prompts_needed(one, other, difference=SHARE * base),
    )


def prompts_needed(before: np.ndarray, after: np.ndarray, *, difference: float) -> int:
    """Computes how many prompts show a true difference of two ratios of sums with a probability of `POWER`.

    n = ((z[1 - alpha / 2] + z[power]) s / difference)^2, at least 2, where s is the standard deviation over prompts of
    the paired, `linearised` differences: further prompts are taken to be like these.

    Args:
        before: [n, 2], numerator and denominator of each prompt, n at least 2.
        after: [n, 2], the same prompts in the same order.
        difference: to be shown by an interval of `LEVEL`, above 0.

    Source: Chow, Shao and Wang 2008, Sample Size Calculations in Clinical Research, section 3.1 (one sample of pairs).
    """
    deviation = float(np.std(linearised(after) - linearised(before), ddof=1))
    quantile = NormalDist().inv_cdf
    return max(2, math.ceil(((quantile((1 + LEVEL) / 2) + quantile(POWER)) * deviation / difference) ** 2))
