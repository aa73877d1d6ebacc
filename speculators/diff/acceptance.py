"""Acceptance lengths of two runs, setting by setting, paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speculators.bench.result import Setting
from speculators.bench.statistics import bootstrap_difference
from speculators.diff.comparison import AcceptanceChange


def acceptance_changes(a: Sequence[Setting], b: Sequence[Setting]) -> list[AcceptanceChange]:
    """Pairs the settings (suite, K, T) that both runs measured on the same prompts."""
    others = {(*setting.key, setting.prompts_digest): setting for setting in b}
    return [
        AcceptanceChange(
            suite=setting.suite,
            num_speculative_tokens=setting.num_speculative_tokens,
            temperature=setting.temperature,
            before=setting.exact.tau,
            after=other.exact.tau,
            interval=_interval(setting, other),
        )
        for setting in a
        if (other := others.get((*setting.key, setting.prompts_digest)))
    ]


def _interval(a: Setting, b: Setting) -> tuple[float, float] | None:
    if not a.by_prompt or a.by_prompt.keys() != b.by_prompt.keys():
        return None
    # [n, 2]: tokens and rounds of each prompt, in one order.
    before, after = (np.array([side.by_prompt[prompt] for prompt in a.by_prompt], dtype=np.float64) for side in (a, b))
    return bootstrap_difference(before, after)
