"""Acceptance lengths of two runs, setting by setting, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speculators.bench.statistics import bootstrap_difference
from speculators.diff.comparison import AcceptanceChange

Values = Mapping[str, Any]


def acceptance_changes(a: Sequence[Values], b: Sequence[Values]) -> list[AcceptanceChange]:
    """Pairs the settings (suite, K, T) that both runs measured on the same prompts.

    Args:
        a, b: settings of benchmarks as JSON values.
    """
    same = ("suite", "num_speculative_tokens", "temperature", "prompts_digest")
    others = {tuple(setting[key] for key in same): setting for setting in b}
    changes = []
    for setting in a:
        other = others.get(tuple(setting[key] for key in same))
        if other is not None:
            changes.append(
                AcceptanceChange(
                    suite=setting["suite"],
                    num_speculative_tokens=setting["num_speculative_tokens"],
                    temperature=setting["temperature"],
                    before=setting["exact"]["tau"],
                    after=other["exact"]["tau"],
                    interval=_interval(setting.get("by_prompt"), other.get("by_prompt")),
                )
            )
    return changes


def _interval(a: Values | None, b: Values | None) -> tuple[float, float] | None:
    if not a or not b or a.keys() != b.keys():
        return None
    before, after = (np.array([side[prompt] for prompt in a], dtype=np.float64) for side in (a, b))
    return bootstrap_difference(before, after)
