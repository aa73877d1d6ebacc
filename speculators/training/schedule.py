"""Pure functions of the step: the factor on the learning rate, and what is due when."""

from __future__ import annotations

import math

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


def interval(every: int | str, total: int) -> int:
    """Converts a recipe's interval, in updates or as "N%" of the run, to updates."""
    if isinstance(every, int):
        return every
    return max(1, round(total * float(every.rstrip("%")) / 100))


def due(step: int, every: int, total: int) -> bool:
    """Whether something is due after `step` updates: at every multiple of `every`, and at the end."""
    return step % every == 0 or step == total
