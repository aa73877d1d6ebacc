"""Compares two replays of the same drafts so that noise raises no alarm, however many comparisons are made.

The null hypothesis is that the change does not help. Under it the difference of an answer is equally likely to have the
opposite sign, so the distribution of the sum over all signs is known (one-sided sign-flip test; Fisher 1935). An answer
is one unit because its places are correlated. A place scores the number of accepted drafts, with 1 / rank of the
answer's token for the first: it shows more than a hit or a miss, and being more or less sure does not change it. Holm's
rule (1979) then bounds the probability that chance makes any of the alternatives look better.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import attrs
import numpy as np

from speculators.bench.statistics import difference_half_width, holm
from speculators.doctor.trials import Trial

# Probability that chance fails any check of a sound speculator, over one whole examination: ALTERNATIVES of it is for
# the alternatives together, the rest for at most SINGLES comparisons that stand alone (values of config.json, lengths).
FALSE_ALARM, ALTERNATIVES, SINGLES = 0.01, 0.008, 8
LEVEL = (FALSE_ALARM - ALTERNATIVES) / SINGLES
# n units cannot give a p value below 2**-n. With fewer answers than FEW, stretches of answers are the units, and the
# answers themselves must agree at the level AGREEMENT, or all of them where so few cannot reach it.
FEW, AGREEMENT = 20, 0.02
# Up to this many units all 2**n signs are summed; beyond it DRAWS random ones give p to 1 in 100,000.
UNITS_EXACT = 14
DRAWS = 100_000
# Share of the accepted drafts: a smaller loss, however certain, is not worth a warning.
LEAST_LOSS = 0.05
# A gain of at least LEAST_LOSS is suspected, though the answers are too few to prove it, up to this chance: that of a
# common fault by itself, that of all other alternatives together.
SUSPICION = 0.05


@attrs.frozen(eq=False)
class TrialComparison:
    """The effect of a change on the configured speculator.

    Attributes:
        gain: accepted drafts per place that the change adds.
        share: the gain relative to the drafts accepted without the change.
        half_width: of the 95% interval of `share`, over answers; infinite for a single answer.
        p: probability of a gain this large in `Trial.scores` if the change does not help.
        p_worse: probability of a loss this large if the change does not hurt.
    """

    gain: float
    share: float
    half_width: float
    p: float
    p_worse: float

    @property
    def better(self) -> bool:
        """Whether the change helps beyond chance, if this is the only comparison."""
        return self.gain > 0 and self.p <= LEVEL

    @property
    def worse(self) -> bool:
        """Whether the change hurts beyond chance and by enough to matter."""
        return self.share <= -LEAST_LOSS and self.p_worse <= LEVEL

    def suspicious(self, count: int) -> bool:
        """Whether the change, one of `count`, helps by as much as is worth a warning, and hardly by chance."""
        return self.share >= LEAST_LOSS and self.p <= SUSPICION / count

    @property
    def size(self) -> str:
        """The gain with its interval, as text."""
        if not math.isfinite(self.share):
            return f"{self.gain:+.2f} accepted drafts per place, where none was accepted"
        if not math.isfinite(self.half_width):
            return f"accepted drafts {self.share:+.1%}"
        low, high = self.share - self.half_width, self.share + self.half_width
        return f"accepted drafts {self.share:+.1%} (95%: {low:+.1%} to {high:+.1%})"


def compare(configured: Trial, changed: Trial) -> TrialComparison:
    """Tests whether a change helps or hurts, paired by answer."""
    before, after = configured.accepted, changed.accepted
    differences = [other - one for one, other in zip(before, after, strict=True)]
    gain = float(np.concatenate(differences).mean())
    base = configured.mean
    share = gain / base if base else math.inf if gain > 0 else 0.0
    wide = math.inf
    if len(before) > 1 and base:
        one, other = (np.array([[part.sum(), len(part)] for part in side]) for side in (before, after))
        wide = difference_half_width(one, other, level=0.95) / base
    scored = differences
    if configured.ranks and changed.ranks:
        # Ranks also show what moves the answer's token up without making it the first: less is left to chance.
        scored = [other - one for one, other in zip(configured.scores, changed.scores, strict=True)]
    p_worse = chance([-part for part in differences])
    return TrialComparison(gain=gain, share=share, half_width=wide, p=chance(scored), p_worse=p_worse)


def chance(differences: Sequence[np.ndarray]) -> float:
    """Computes the one-sided p value of the sum of all differences, [L] per answer."""
    answers = np.array([part.sum() for part in differences])
    if len(answers) >= FEW:
        return sign_flip(answers)
    # Stretches of one answer are not quite independent, so they may not speak against their answers.
    agreed = sign_flip(answers)
    if agreed > max(AGREEMENT, 2.0 ** -np.count_nonzero(answers)):
        return agreed
    return sign_flip(stretches(differences))


def stretches(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Sums the differences within stretches of answers, at least twice FEW where places suffice."""
    pieces = -(-2 * FEW // max(1, len(differences)))
    parts = [part for one in differences for part in np.array_split(one, min(pieces, max(1, len(one))))]
    return np.array([part.sum() for part in parts])


def sign_flip(sums: np.ndarray) -> float:
    """Computes the one-sided p value of the total of `sums` [n] under random signs."""
    # A zero has the same sum under either sign and carries no information.
    sums = sums[sums != 0]
    size = len(sums)
    if size <= UNITS_EXACT:
        codes = np.arange(2**size)
        signs = 1 - 2 * ((codes[:, None] >> np.arange(size)) & 1)
        return float((signs @ sums >= sums.sum() - 1e-9).mean())
    totals = _signs(size, DRAWS) @ sums.astype(np.float32)
    return float((1 + (totals >= sums.sum() - 1e-4).sum()) / (1 + DRAWS))


@functools.lru_cache(maxsize=4)
def _signs(size: int, draws: int) -> np.ndarray:
    """Draws random signs, [draws, size]; the same for all comparisons of one size."""
    return 2 * np.random.default_rng(0).integers(0, 2, size=(draws, size), dtype=np.int8).astype(np.float32) - 1


def level_weights(common: Sequence[bool]) -> np.ndarray:
    """Weighs alternatives so that the common ones have half of the level, if there are others, too: [n]."""
    marks = np.asarray(common, bool)
    shares = np.where(marks, 1 / max(1, marks.sum()), 1 / max(1, (~marks).sum()))
    return np.asarray(shares / shares.sum())


def significant(chances: Sequence[float], weights: np.ndarray | None = None, level: float = ALTERNATIVES) -> list[bool]:
    """Marks the p values that are significant at a level that holds over all of them together (weighted Holm).

    Args:
        chances: [n] p values.
        weights: [n] shares of the level, above 0; None for equal ones.
        level: probability that chance marks any.
    """
    return holm(chances, level=level, weights=weights)
