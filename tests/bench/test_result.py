"""What a benchmark's result says beyond what was counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from speculators.bench.result import BenchResult


def setting(k: int, draft: float, verify: float, drafted: float, temperature: float = 0.0) -> Any:
    """One K whose rounds took `draft` and `verify` seconds; without drafts 20 tokens a second."""
    speed = SimpleNamespace(draft_seconds=draft, verify_seconds=verify, plain=20.0)
    where = {"suite": "quickstart", "temperature": temperature, "num_speculative_tokens": k}
    return SimpleNamespace(**where, exact=SimpleNamespace(drafted=drafted), live=SimpleNamespace(speed=speed))


def cost(settings: list[Any]) -> float | None:
    """Of the last setting."""
    return BenchResult.drafted_cost(SimpleNamespace(settings=settings), settings[-1])


def test_the_cost_of_one_more_drafted_token_is_that_of_longer_rounds():
    """From the smallest K to the largest: 20 ms for 4 tokens more, so 5 ms each of the 50 that a token takes."""
    settings = [setting(3, 0.010, 0.050, 3.0), setting(5, 0.016, 0.054, 5.0), setting(7, 0.020, 0.060, 7.0)]
    assert cost(settings) == pytest.approx(0.1)
    assert cost([setting(1, 0.5, 0.5, 1.0, temperature=1.0), *settings]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings",
    [
        [setting(3, 0.01, 0.05, 3.0)],
        [setting(3, 0.01, 0.05, 3.0), setting(5, 0.01, 0.04, 5.0)],
        [setting(3, 0.01, 0.05, 2.0), setting(5, 0.02, 0.05, 2.0)],
    ],
    ids=["one K", "longer rounds were not slower", "as many drafted"],
)
def test_no_cost_is_told_where_none_can_be(settings):
    """A difference of noise is no cost."""
    assert cost(settings) is None
