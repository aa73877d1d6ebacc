"""Acceptance lengths of two runs, setting by setting, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from speculators.bench.statistics import bootstrap_difference

Values = Mapping[str, Any]


def differences(a: Values, b: Values) -> list[dict[str, Any]]:
    """Returns tau of both benchmarks wherever they measured the same, with an interval of the difference.

    Args:
        a, b: benchmarks as JSON values.

    Returns:
        A row for each (suite, K, T) that both have on the same prompts; `interval` is None where a result of an older
        format does not tell its prompts one by one.
    """
    keys = ("suite", "num_speculative_tokens", "temperature")
    others = {tuple(setting[key] for key in keys): setting for setting in b["settings"]}
    rows = []
    for setting in a["settings"]:
        other = others.get(tuple(setting[key] for key in keys))
        if other is None or setting["prompts_digest"] != other["prompts_digest"]:
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
