"""Acceptance lengths of two runs, setting by setting, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speculators.bench.statistics import bootstrap_difference

Values = Mapping[str, Any]


def differences(a: Sequence[Values], b: Sequence[Values]) -> list[dict[str, Any]]:
    """Returns tau of both wherever they measured the same, with an interval of the difference.

    Args:
        a, b: settings of benchmarks as JSON values.

    Returns:
        A row for each (suite, K, T) that both have on the same prompts; `interval` is None where they do not tell the
        same prompts one by one.
    """
    keys = ("suite", "num_speculative_tokens", "temperature")
    same = (*keys, "prompts_digest")
    others = {tuple(setting[key] for key in same): setting for setting in b}
    rows = []
    for setting in a:
        other = others.get(tuple(setting[key] for key in same))
        if other is None:
            continue
        rows.append(
            {
                **{key: setting[key] for key in keys},
                "before": setting["exact"]["tau"],
                "after": other["exact"]["tau"],
                "interval": _interval(setting.get("by_prompt"), other.get("by_prompt")),
            }
        )
    return rows


def _interval(a: Values | None, b: Values | None) -> tuple[float, float] | None:
    if not a or not b or a.keys() != b.keys():
        return None
    before, after = (np.array([side[prompt] for prompt in a], dtype=np.float64) for side in (a, b))
    return bootstrap_difference(before, after)
