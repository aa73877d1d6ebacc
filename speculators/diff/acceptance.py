"""Acceptance lengths of two runs, setting by setting, paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence

from speculators.bench.paired import paired_difference
from speculators.bench.result import Setting
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
    difference = paired_difference(a.by_prompt, b.by_prompt)
    return None if difference is None else (difference.low, difference.high)
