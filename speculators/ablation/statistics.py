"""Differences of acceptance length from a base, with intervals over prompts and seeds.

Arms (the base and its variants) are measured with several seeds on the same prompts. Seeds and prompts are both samples
of what one would like to speak about, so both enter the interval. This is the analysis of many readers and many cases
in medical imaging, with arms for modalities, seeds for readers and prompts for cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from speculators.bench.statistics import ROUNDING, linearised, student_chance, student_quantile

LEVEL = 0.95
# [n, 2], tokens and rounds of each prompt; None where the run failed or has not ended.
Sums = np.ndarray | None


@attrs.frozen(kw_only=True)
class SeedVariance:
    """The spread of tau between seeds, beyond what all arms of a seed share.

    Attributes:
        variance: of the tau of one run.
        freedom: degrees of freedom of the estimate; 0 where no arm has a second seed, and the variance is then NaN.
    """

    variance: float
    freedom: int


@attrs.frozen(kw_only=True)
class TauDifference:
    """The tau of a variant minus that of the base.

    Attributes:
        mean: over seeds.
        low, high: of the 95% interval.
        seeds: measured for both.
        prompts: measured for both.
        seed_error: standard error from seeds; None with one seed for every arm.
        prompt_error: standard error from prompts.
        freedom: degrees of freedom of Student's t.
        p: two-sided p value of no difference.
    """

    mean: float
    low: float
    high: float
    seeds: int
    prompts: int
    seed_error: float | None
    prompt_error: float
    freedom: float
    p: float

    @property
    def over_seeds(self) -> bool:
        """Whether the interval is over seeds, too, and not over prompts alone."""
        return self.seed_error is not None


def seed_variance(arms: Sequence[Sequence[Sums]]) -> SeedVariance:
    """Pools the spread between seeds over all arms, the base among them.

    tau[arm, seed] = m[arm] + g[seed] + e[arm, seed] is fitted by least squares, and the variance of e is the sum of the
    squared residuals over their degrees of freedom, (arms - 1) (seeds - 1) where no run is missing. What a seed does to
    all arms alike, g, cancels from differences. Pooling differences from the base instead would count the base's own
    e once for each variant: for eight variants its degrees of freedom are worth 4 V / (V + 3) = 2.9 (seeds - 1) instead
    of 8 (seeds - 1), and intervals that assume all of them are too narrow. All arms are taken to spread alike: with
    eight variants and three seeds, one that spreads twice as far as the others is covered in 88% instead of 95%.

    Args:
        arms: for each arm the sums of each seed.

    Source: Montgomery, Design and Analysis of Experiments, section 4.1 (randomised complete block design).
    """
    cells = [(arm, seed) for arm, by_seed in enumerate(arms) for seed, sums in enumerate(by_seed) if sums is not None]
    taus = np.array([_ratio(arms[arm][seed]) for arm, seed in cells])
    design = np.zeros((len(cells), len(arms) + max(map(len, arms), default=0)))
    for row, (arm, seed) in enumerate(cells):
        design[row, [arm, len(arms) + seed]] = 1.0
    freedom = len(cells) - int(np.linalg.matrix_rank(design)) if cells else 0
    if freedom == 0:
        return SeedVariance(variance=float("nan"), freedom=0)
    residuals = taus - design @ np.linalg.lstsq(design, taus, rcond=None)[0]
    return SeedVariance(variance=float(residuals @ residuals) / freedom, freedom=freedom)


def difference(base: Sequence[Sums], variant: Sequence[Sums], pooled: SeedVariance) -> TauDifference | None:
    """Computes the difference of two ratios of sums, paired by prompt and by seed, with its 95% interval.

    With S seeds and n prompts, and d[s, i] the `linearised` difference of prompt i at seed s, the variance is

        2 v / S  +  max(0, P - I),   P = var_i(mean_s d) / n,   I = sum_si (d - mean_s d)^2 / ((S - 1) (n - 1) S n)

    where v is the pooled variance between seeds. P is the part of the prompts. It contains the interaction I, by which
    a prompt moves from seed to seed, and so does v: it is taken off once. The interval is Student's t with
    Satterthwaite's degrees of freedom. With a single seed the variance is P, with n - 1 degrees of freedom.

    Args:
        base: for each seed, the sums of the base; None where they are missing.
        variant: the same seeds and prompts.
        pooled: of all arms, from `seed_variance`.

    Returns:
        None where no seed has both sides, and with fewer than two prompts.

    Sources: Obuchowski and Rockette 1995 and Hillis 2007, Statistics in Medicine 26 (multi-reader multi-case; the same
    subtraction, clipped likewise); Satterthwaite 1946 (degrees of freedom of a sum).
    """
    pairs = [(one, other) for one, other in zip(base, variant, strict=True) if one is not None and other is not None]
    if not pairs or len(pairs[0][0]) < 2:
        return None
    mean = float(np.mean([_ratio(other) - _ratio(one) for one, other in pairs]))
    parts = np.array([linearised(other) - linearised(one) for one, other in pairs])  # [S, n]
    seeds, prompts = parts.shape
    by_prompt = parts.mean(axis=0)
    over_prompts = float(by_prompt.var(ddof=1)) / prompts
    over_seeds = 2 * pooled.variance / seeds if pooled.freedom else 0.0
    if seeds > 1:
        shared = float(((parts - by_prompt) ** 2).sum()) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
        over_prompts = max(0.0, over_prompts - shared)
    variance = over_seeds + over_prompts
    uncertainty = over_prompts**2 / (prompts - 1) + (over_seeds**2 / pooled.freedom if pooled.freedom else 0.0)
    freedom = variance**2 / uncertainty if uncertainty else float(prompts - 1)
    error = variance**0.5 if variance > ROUNDING**2 else 0.0
    half = student_quantile((1 + LEVEL) / 2, freedom) * error
    return TauDifference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        seeds=seeds,
        prompts=prompts,
        seed_error=over_seeds**0.5 if pooled.freedom else None,
        prompt_error=over_prompts**0.5,
        freedom=freedom,
        p=student_chance(mean / error, freedom) if error else float(abs(mean) < ROUNDING),
    )


def _ratio(sums: Sums) -> float:
    """Tau: a ratio of sums over prompts."""
    assert sums is not None, "only cells with sums are asked for"
    return float(sums[:, 0].sum() / sums[:, 1].sum())
