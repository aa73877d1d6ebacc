"""Pure functions of the step: the factor on the learning rate, and what is due when."""

from __future__ import annotations

import math
from fractions import Fraction

from speculators.recipe.schema import LearningRate


def factor(step: int, total: int, section: LearningRate) -> float:
    """Computes the factor on the peak learning rate for one update.

    Warm-up rises linearly and reaches 1 with its last update. Then, with p in [0, 1) the share of the way to `total`:
    linear is 1 - p, cosine (1 + cos(pi p)) / 2 (Loshchilov and Hutter, SGDR, equation 5, one cycle), wsd stays at 1
    and falls linearly over its last `decay` share of all steps (Hu et al., MiniCPM, section 4), constant stays at 1.
    Every shape that falls ends at `floor`.

    Args:
        step: updates made so far: the first update is step 0, the last is `total` - 1.
        total: updates of the whole run.
    """
    warmup = round(section.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    start = warmup
    if section.shape == "wsd":
        start = max(warmup, total - round(section.decay * total))
    if section.shape == "constant" or step < start:
        return 1.0
    gone = (step - start) / (total - start)
    left = (1 + math.cos(math.pi * gone)) / 2 if section.shape == "cosine" else 1 - gone
    return section.floor + (1 - section.floor) * left


def due(step: int, every: int | str, total: int) -> bool:
    """Whether something is due after `step` updates: at every multiple of `every`, and at the end.

    Args:
        every: updates, or a share of the run: "25%" is due at the first updates that complete a quarter, a half, three
            quarters and the whole, so that the last share and the end are one.
    """
    length = every if isinstance(every, int) else total * Fraction(every.rstrip("%")) / 100
    return step // length > (step - 1) // length or step == total
