"""How `spec bench` lets the verifier sample: the command line in place of the run's recipe."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from speculators.cli import bench, bench_section
from speculators.errors import RecipeError

BLOCK = ("--verification", "block")
RECIPE: dict[str, Any] = {"benchmark": {"suites": ["quickstart"], "temperature": [0.0, 0.7], "top_p": 0.9, "top_k": 20}}


def section(*arguments: str, recipe: dict[str, Any] = RECIPE) -> Any:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench_section.benchmark_section(parser.parse_args(["run", *arguments]), recipe)


@pytest.mark.parametrize(
    ("arguments", "temperature", "token_filter"),
    [
        ((), (0.0, 0.7), "top_k=20, top_p=0.9"),
        (("--top-p", "0.5"), (0.0, 0.7), "top_k=20, top_p=0.5"),
        (("--temperature", "1", "--min-p", "0.1"), (1.0,), "min_p=0.1, top_k=20, top_p=0.9"),
        (("--temperature", "0"), (0.0,), ""),
        (("--temperature", "model"), "model", ""),
    ],
)
def test_filters_are_the_recipes_unless_they_do_not_go_with_the_temperature(arguments, temperature, token_filter):
    """Greedy decoding has none, and with `model` they are the verifier's own."""
    found = section(*arguments)
    assert (found.temperature, str(found.token_filter)) == (temperature, token_filter)


@pytest.mark.parametrize(
    ("arguments", "verification"),
    [
        ((), "block"),
        (("--verification", "token"), "token"),
        (("--temperature", "1"), "block"),
        (("--temperature", "model"), "block"),
        (("--temperature", "0"), "token"),
    ],
)
def test_the_rule_of_verification_is_the_recipes_unless_nothing_is_sampled(arguments, verification):
    """Greedy decoding accepts the same drafts by either rule, and has the default's name."""
    recipe = {"benchmark": {**RECIPE["benchmark"], "verification": "block"}}
    assert section(*arguments, recipe=recipe).verification == verification


def test_another_rule_for_greedy_decoding_is_refused():
    """Asked for by name, it would do nothing."""
    with pytest.raises(RecipeError, match="verification: greedy decoding does not sample"):
        section("--temperature", "0", *BLOCK)


@pytest.mark.parametrize(
    ("arguments", "other"),
    [
        ((), False),
        (("--temperature", "0"), False),
        (("--temperature", "1"), False),
        (("--top-p", "0.5"), True),
        (("--temperature", "model"), True),
        (BLOCK, True),
        (("--verification", "token"), False),
    ],
)
def test_numbers_under_other_sampling_are_not_the_runs(arguments, other):
    """A run keeps one number for each suite, K and T: that of its own filters and its own rule of verification."""
    assert bench_section.other_sampling(section(*arguments), RECIPE) is other
