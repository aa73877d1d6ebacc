"""The result of a benchmark: what follows from its numbers, and its way to JSON and back."""

from __future__ import annotations

import json
import math

import attrs
import made_results
import pytest

from speculators.bench.paired import PairedDifference
from speculators.bench.result import BaselineRow, BenchResult, PromptCounts, Setting, drafted_cost
from speculators.servers.load import Spread
from speculators.servers.result import ServedResult
from speculators.structure.converter import structure


def setting(k: int, draft: float, verify: float, drafted: float, temperature: float = 0.0) -> Setting:
    """One K whose rounds took `draft` and `verify` seconds; plain decoding makes 20 tokens per second."""
    speed = made_results.speed(draft_seconds=draft, verify_seconds=verify, plain=20.0)
    return made_results.setting(
        num_speculative_tokens=k,
        temperature=temperature,
        exact=made_results.acceptance(drafted=drafted),
        live=attrs.evolve(made_results.live(), speed=speed),
    )


def cost_of_last(settings: list[Setting]) -> float | None:
    return drafted_cost(settings[-1], settings)


def test_one_more_drafted_token_costs_what_longer_rounds_take() -> None:
    """From the smallest K to the largest: 20 ms for 4 tokens more, so 5 ms each of the 50 that a token takes."""
    settings = [setting(3, 0.010, 0.050, 3.0), setting(5, 0.016, 0.054, 5.0), setting(7, 0.020, 0.060, 7.0)]
    assert cost_of_last(settings) == pytest.approx(0.1)
    assert cost_of_last([setting(1, 0.5, 0.5, 1.0, temperature=1.0), *settings]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings",
    [
        [setting(3, 0.01, 0.05, 3.0)],
        [setting(3, 0.01, 0.05, 3.0), setting(5, 0.01, 0.04, 5.0)],
        [setting(3, 0.01, 0.05, 2.0), setting(5, 0.02, 0.05, 2.0)],
    ],
    ids=["one K", "longer rounds were not slower", "as many drafted"],
)
def test_there_is_no_cost_where_the_difference_is_noise(settings: list[Setting]) -> None:
    """A single K, rounds that were not slower, and rounds that drafted no more have no cost."""
    assert cost_of_last(settings) is None


def test_a_result_is_read_back_as_it_was_written() -> None:
    """Every field survives JSON; NaN travels as null, derived fields are computed again."""
    unreached = made_results.acceptance(
        tau=math.nan, by_position_conditional=(0.5, math.nan, math.nan), by_position_interval=((0.5, math.nan),) * 3
    )
    counts = {"a": PromptCounts(tokens=3.0, rounds=2.0, drafted=6.0, reached=(2.0,), accepted=(1.0,))}
    difference = PairedDifference(mean=0.1, low=0.05, high=0.15, prompts=20, prompts_for_share=30)
    row = BaselineRow(
        name="ngram",
        acceptance=unreached,
        live_tau=1.5,
        speed=made_results.speed(),
        counts_by_prompt=counts,
        difference=difference,
    )
    one = made_results.setting(
        by_category={"chat": unreached, "agrees": unreached},
        by_prompt={"a": (3.0, 2.0)},
        counts_by_prompt=counts,
        baselines=(row,),
        by_context=(made_results.tokens_up_to(128, tau=1.5),),
        by_place=(made_results.tokens_up_to(64, tau=1.5),),
    )
    other = made_results.setting(live=made_results.live(gap="prompt 3"), num_speculative_tokens=5)
    for result in (
        made_results.bench_result(one, other, fingerprint="f"),
        made_results.bench_result(attrs.evolve(one, live=None)),
    ):
        document = json.loads(json.dumps(result.to_json(), allow_nan=False))
        again, problems = structure(document, BenchResult)
        assert again is not None, problems
        assert again.to_json() == result.to_json() == document
        assert again.agrees is result.agrees
        assert math.isnan(again.settings[0].by_category["chat"].tau)


def test_a_served_result_is_read_back_as_it_was_written() -> None:
    """With and without a baseline and the rounds of single prompts."""
    one = made_results.served_setting()
    spread = Spread(mean=0.5, p50=0.4, p95=0.9)
    pace = attrs.evolve(one.pace, first_token=spread, inter_token=spread)
    other = attrs.evolve(one, by_prompt={"a": (3.0, 2.0)}, prompt_ids=("a",), pace=pace, baseline=pace, speed_up=1.5)
    result = made_results.served_result(one, other, baseline_endpoint="http://there", baseline_model="tiny")
    again, problems = structure(json.loads(json.dumps(result.to_json(), allow_nan=False)), ServedResult)
    assert again == result, problems


def test_a_damaged_result_names_the_field() -> None:
    """A missing key and a value of the wrong type are both reported, with their paths."""
    document = made_results.bench_result(made_results.setting()).to_json()
    del document["settings"][0]["exact"]["tau"]
    document["threads"] = "two"
    result, problems = structure(document, BenchResult)
    assert result is None
    assert sorted(problem.path for problem in problems) == ["settings[0].exact.tau", "threads"]
    assert any("a number or null" in problem.message for problem in problems)
