"""What a benchmark recommends, from settings with made-up numbers."""

from __future__ import annotations

from math import nan

import attrs
import made_results
import pytest

from speculators.bench.conclusion import best_k, conclude
from speculators.bench.result import Setting

# Each draft is accepted less often than the one before it.
RATES = (0.4, 0.19, 0.09, 0.04, 0.02)


def setting(
    k: int, speed_up: float | None, *, tau: float = 1.7, cost: float | None = None, **changes: object
) -> Setting:
    """One K with its speed-up; None for no live decode."""
    live = None
    if speed_up is not None:
        speed = made_results.speed(speed_up=speed_up, unmatched_baseline=speed_up > tau)
        live = attrs.evolve(made_results.live(), speed=speed)
    exact = made_results.acceptance(tau=tau, by_position=RATES[:k])
    values = {"num_speculative_tokens": k, "live": live, "exact": exact, "drafted_cost": cost}
    return made_results.setting(**(values | changes))


def test_the_fastest_k_is_the_best_one() -> None:
    """Also where a longer draft has the greater acceptance length; the order of the settings does not matter."""
    conclusion = conclude([setting(5, 1.0, tau=1.8), setting(3, 1.1)])
    assert (conclusion.best.num_speculative_tokens, conclusion.speed_up) == (3, 1.1)


@pytest.mark.parametrize("untimed", [2.5, None])
def test_a_time_that_cannot_be_true_decides_nothing(untimed: float | None) -> None:
    """A speed-up beyond tau is left out; without any time the acceptance length decides, and NaN is the least."""
    assert conclude([setting(5, untimed, tau=1.8), setting(3, 0.9)]).best.num_speculative_tokens == 3
    nothing = conclude([setting(5, untimed, tau=1.8), setting(3, untimed), setting(7, None, tau=nan)])
    assert (nothing.best.num_speculative_tokens, nothing.speed_up, nothing.pays_above) == (5, None, None)


def test_an_extra_draft_pays_if_it_yields_more_than_it_costs() -> None:
    """Compared with decoding at the best K, or with plain decoding where that is faster."""
    assert conclude([setting(3, 1.5), setting(5, 1.4, cost=0.1)]).pays_above == pytest.approx(0.15)
    assert conclude([setting(3, 0.5), setting(5, 0.4, cost=0.1)]).pays_above == pytest.approx(0.1)
    assert conclude([setting(3, 1.5), setting(5, 1.4)]).pays_above is None


def test_a_k_that_was_not_measured_is_named_where_it_should_be_clearly_faster() -> None:
    """Drafts that cost 25% of a step and are accepted 19% and 9% of the time do not pay: one draft is better."""
    assert conclude([setting(3, 0.9), setting(5, 0.7, cost=0.25)]).untried == 1
    assert conclude([setting(1, 1.1), setting(5, 0.7, cost=0.25)]).untried is None
    assert conclude([setting(3, 1.2), setting(5, 1.2, cost=0.02)]).untried is None


def test_the_k_to_serve_is_the_best_over_all_suites_and_temperatures() -> None:
    """By the product of speed-ups; a K that was measured in one place only does not count."""
    hot = {"temperature": 1.0}
    settings = [setting(3, 1.2), setting(5, 1.3), setting(3, 1.1, **hot), setting(5, 0.9, **hot), setting(7, 1.6)]
    assert best_k(settings) == 3
    assert best_k(settings[:2]) == 5
    assert best_k([setting(3, None), setting(5, None, tau=1.8)]) == 5
    assert best_k([]) is None
