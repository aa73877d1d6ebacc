"""How `spec bench` lets the verifier sample: the command line in place of the run's recipe."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from speculators.cli import bench

RECIPE: dict[str, Any] = {"benchmark": {"suites": ["quickstart"], "temperature": [0.0, 0.7], "top_p": 0.9, "top_k": 20}}


def section(*arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench._section(parser.parse_args(["run", *arguments]), RECIPE)


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
    ("arguments", "other"),
    [
        ((), False),
        (("--temperature", "0"), False),
        (("--temperature", "1"), False),
        (("--top-p", "0.5"), True),
        (("--temperature", "model"), True),
    ],
)
def test_numbers_under_other_filters_are_not_the_runs(arguments, other):
    """A run keeps one number for each suite, K and T: that of its own filters."""
    assert bench._other_filters(section(*arguments), RECIPE) is other
