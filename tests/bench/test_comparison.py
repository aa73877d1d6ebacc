"""Benchmarks of several speculators side by side."""

from __future__ import annotations

from typing import Any

import attrs
import made_results
import pytest

from speculators.bench.comparison import BenchComparison, ComparedSpeculator, compare_benches
from speculators.bench.result import BaselineRow, BenchResult, PromptCounts, Setting

PROMPTS = 20


def counted(tau: float) -> dict[str, PromptCounts]:
    """Counts of prompts that differ from each other, with this tau over all of them."""
    return {
        str(index): PromptCounts(
            tokens=tau * (20 + index), rounds=20.0 + index, drafted=60.0, reached=(9.0,) * 3, accepted=(3.0,) * 3
        )
        for index in range(PROMPTS)
    }


def measured(tau: float, **changes: Any) -> Setting:
    by_prompt = {name: (each.tokens, each.rounds) for name, each in counted(tau).items()}
    values = {"exact": made_results.acceptance(tau), "by_prompt": by_prompt}
    return made_results.setting(**(values | changes))


def baseline(name: str, tau: float) -> BaselineRow:
    acceptance = made_results.acceptance(tau, tokens=100 * tau)
    return BaselineRow(name=name, acceptance=acceptance, counts_by_prompt=counted(tau))


def speculator(name: str, *results: BenchResult, verifier: str = "v", template: str = "") -> ComparedSpeculator:
    return ComparedSpeculator(name=name, verifier=verifier, template=template, results=results)


def compared(**results: BenchResult) -> BenchComparison:
    return compare_benches([speculator(name, result) for name, result in results.items()])


def test_each_is_compared_with_the_first_in_the_same_setting() -> None:
    """By suite, K and T; the first has no difference from itself."""
    ks = (5, 3)
    one, other = (
        made_results.bench_result(*(measured(tau + k / 100, num_speculative_tokens=k) for k in ks)) for tau in (2, 2.1)
    )
    comparison = compared(one=one, other=other)
    rows = [(row.speculator, row.setting.num_speculative_tokens) for row in comparison.rows]
    assert rows == [("one", 3), ("one", 5), ("other", 3), ("other", 5)]
    assert [row.difference for row in comparison.rows[:2]] == [None, None]
    assert [row.difference.mean for row in comparison.rows[2:]] == pytest.approx([0.1, 0.1])
    assert [row.incomparable for row in comparison.rows] == [""] * 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompts_digest": "e"}, "other prompts"),
        ({"definition": "tau was"}, "another definition of tau"),
        ({"num_speculative_tokens": 9}, "the first was not measured there"),
        ({"by_prompt": {}}, "its result has no counts by prompt"),
        ({"by_prompt": {"0": (2.0, 1.0)}}, "fewer than two prompts"),
    ],
)
def test_settings_that_differ_in_more_than_drafts_are_not_compared(change: dict[str, Any], reason: str) -> None:
    """The reason stands beside the row."""
    one, other = (made_results.bench_result(measured(2.0, **changes)) for changes in ({}, change))
    row = compared(one=one, other=other).rows[1]
    assert (row.difference, row.incomparable) == (None, reason)


def test_other_verifiers_precisions_and_lengths_are_not_compared() -> None:
    """All reasons are named."""
    one = made_results.bench_result(measured(2.0))
    other = attrs.evolve(one, verifier="elsewhere", dtype="bfloat16", max_new_tokens=99)
    row = compare_benches([speculator("one", one), speculator("other", other, verifier="w")]).rows[1]
    assert row.incomparable == "another verifier, another precision, answers of another length"


def test_one_verifier_may_be_named_in_two_ways_but_not_have_two_templates() -> None:
    """A run names a GGUF file, and a folder's config.json the place where that was converted to."""
    one = made_results.bench_result(measured(2.0))
    rows = compare_benches(
        [speculator("one", one), speculator("other", one, verifier="w"), speculator("third", one, template="t")]
    ).rows
    assert [row.incomparable for row in rows] == ["", "", "another chat template"]


def test_a_baseline_follows_the_speculator_beside_which_it_was_measured() -> None:
    """One that drafts the same beside a later speculator is listed once; hybrids differ between speculators."""
    one, other = (
        made_results.bench_result(
            measured(tau, baselines=(baseline("ngram", 1.5), baseline("hybrid:ngram", tau + 0.3)))
        )
        for tau in (2.0, 2.1)
    )
    rows = compared(one=one, other=other).rows
    assert [(row.speculator, row.baseline) for row in rows] == [
        ("one", ""), ("one", "ngram"), ("one", "hybrid:ngram"), ("other", ""), ("other", "hybrid:ngram"),
    ]  # fmt: skip
    differences = [row.difference.mean for row in rows[1:] if row.difference]
    assert differences == pytest.approx([-0.5, 0.3, 0.1, 0.4])


def test_json_has_all_counts_and_every_difference() -> None:
    """Others can compute each number again from the counts of the prompts."""
    results = [made_results.bench_result(measured(tau, counts_by_prompt=counted(tau))) for tau in (2.0, 2.1)]
    document = compared(one=results[0], other=results[1]).to_json()
    assert document["first"] == "one"
    counts = document["speculators"][1]["results"][0]["settings"][0]["counts_by_prompt"]
    assert sum(each["tokens"] for each in counts.values()) == pytest.approx(
        2.1 * sum(each["rounds"] for each in counts.values())
    )
    assert [each["difference"] and each["difference"]["shown"] for each in document["differences"]] == [None, True]


def test_a_disagreement_of_live_and_replay_is_that_of_the_whole() -> None:
    """One is enough."""
    good, bad = (made_results.bench_result(measured(2.0, live=made_results.live(gap=gap))) for gap in ("", "prompt 3"))
    assert compared(one=good, other=good).agrees
    assert not compared(one=good, other=bad).agrees
