"""K by batch size: costs between the loads that were measured, ranges, and the text that vLLM takes."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from speculators.servers.load import ServingSpeed, Spread
from speculators.tune.result import DraftingPace, LoadPoint
from speculators.tune.schedule import choose, off_from, ranges, relative_cost, vllm_text
from speculators.tune.served import concurrencies, in_flight


def pace(seconds: float = 1.0) -> ServingSpeed:
    """Makes the pace of two answers of six tokens: 0.1 s to the first, 0.05 s between the others."""
    first, between = (Spread(mean=mean, p50=mean, p95=mean) for mean in (0.1, 0.05))
    return ServingSpeed(
        requests=2,
        tokens=12,
        seconds=seconds,
        tokens_per_second=12 / seconds,
        first_token=first,
        inter_token=between,
        repeated=0,
    )


def point(load: int, costs: dict[int, float], step: float = 0.01) -> LoadPoint:
    """Makes a load at which rounds of K drafts take `costs[K]` steps."""
    drafting = tuple(
        DraftingPace(num_speculative_tokens=k, in_flight=load, round_seconds=cost * step, tau=2.0, pace=pace())
        for k, cost in costs.items()
    )
    return LoadPoint(concurrency=load, in_flight=load, step_seconds=step, plain=pace(), drafting=drafting)


POINTS = [point(1, {4: 1.2}), point(4, {4: 1.4}), point(16, {4: 3.0}, step=0.02)]


def test_ranges_cover_every_batch_size_once() -> None:
    """Whatever K the batch sizes have: the ranges follow each other from 1, and give each batch size its own K."""
    source = random.Random(0)
    for _ in range(50):
        ks = [source.choice((0, 1, 3)) for _ in range(source.randint(1, 40))]
        schedule = ranges(ks)
        covered = [(batch, k) for first, last, k in schedule for batch in range(first, last + 1)]
        assert covered == list(enumerate(ks, start=1))
        assert all(before[2] != after[2] for before, after in itertools.pairwise(schedule))


def test_costs_are_those_measured_and_lie_between_them_elsewhere() -> None:
    """At a measured load and K the cost is the measured one; K = 0 costs a step; in between it grows evenly."""
    assert relative_cost(POINTS, 4, 4) == pytest.approx(1.4)
    assert relative_cost(POINTS, 4, 0) == 1.0
    assert relative_cost(POINTS, 4, 2) == pytest.approx(1.2)
    # Half-way between loads 1 and 4 by logarithm.
    assert relative_cost(POINTS, 2, 4) == pytest.approx(1.3)
    assert relative_cost(POINTS, 64, 4) == relative_cost(POINTS, 16, 4) == pytest.approx(3.0)


def test_several_servers_pin_the_cost_of_several_k() -> None:
    """A server started with K = 2 replaces the straight line from 0 to 4."""
    points = [point(1, {2: 1.5, 4: 1.6})]
    assert relative_cost(points, 1, 2) == pytest.approx(1.5)
    assert relative_cost(points, 1, 3) == pytest.approx(1.55)


def test_the_best_k_falls_with_the_load_and_ends_at_nothing() -> None:
    """Where rounds are cheap the longest draft wins; where a draft costs more than it brings, none does."""
    taus = {1: 1.4, 4: 2.1}
    # At batch 4 a round of one costs 1.1, of four 1.4; at batch 16 they cost 1.5 and 3.
    assert choose(POINTS, taus, 1).num_speculative_tokens == 4
    assert choose(POINTS, taus, 1).predicted == pytest.approx(2.1 / 1.2)
    assert choose(POINTS, {1: 1.4, 4: 1.7}, 4).num_speculative_tokens == 1
    assert choose(POINTS, taus, 16).num_speculative_tokens == 0
    schedule = ranges([choose(POINTS, taus, batch).num_speculative_tokens for batch in range(1, 17)])
    assert schedule[0][2] == 4
    assert off_from(schedule) == schedule[-1][0]
    assert off_from(((1, 8, 3),)) is None


def test_vllm_reads_a_list_of_inclusive_ranges_beside_the_largest_k() -> None:
    """Its validation asks for [first, last, K] from batch size 1, and for no K above num_speculative_tokens."""
    text = vllm_text(((1, 16, 3), (17, 64, 2), (65, 256, 0)))
    assert json.loads("{" + text + "}") == {
        "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[1, 16, 3], [17, 64, 2], [65, 256, 0]],
    }


def test_the_batch_size_is_the_mean_number_of_answers_under_way() -> None:
    """By Little's law: two answers of 0.1 + 5 * 0.05 s within a second are 0.7 at once."""
    assert in_flight(pace(seconds=1.0)) == pytest.approx(0.7)


@pytest.mark.parametrize(("limit", "loads"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_loads_are_powers_of_two_and_the_limit(limit: int, loads: list[int]) -> None:
    """The largest load that was asked for is always measured."""
    assert concurrencies(limit) == loads
