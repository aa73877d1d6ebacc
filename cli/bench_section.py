"""Reads what `spec bench` measures: a run's own `[benchmark]`, with the command line's values in it."""

from __future__ import annotations

import argparse
from typing import Any

import attrs

from speculators.errors import Problem, RecipeError
from speculators.recipe.document import overrides_table

FILTERS = ("top_p", "top_k", "min_p")


def decoding_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Collects the keys of `[algorithm]` that --set overrides; raises RecipeError for any other section."""
    table = overrides_table(options.set or ())
    algorithm = table.pop("algorithm", {})
    if table or not isinstance(algorithm, dict):
        raise RecipeError([Problem("--set", "spec bench overrides [algorithm] only: --set algorithm.KEY=VALUE")])
    return algorithm


def temperature_option(text: str) -> float | str:
    """Reads a temperature, or "model"; raises ArgumentTypeError for anything else."""
    try:
        return text if text == "model" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or model; got {text!r}") from None


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Collects how the verifier samples and verifies; drops the recipe's keys that the temperatures rule out."""
    keys = {key: getattr(options, key) for key in (*FILTERS, "verification")}
    asked = options.temperature
    if asked is None:
        return keys
    if "model" in asked and len(asked) > 1:
        raise RecipeError([Problem("--temperature", "model stands alone: it may bring filters of its own")])
    own = asked == ["model"]
    greedy = not own and not any(temperature > 0 for temperature in asked)
    off = dict.fromkeys(FILTERS, "none") if own or greedy else {}
    if greedy:
        off["verification"] = "token"
    chosen = {key: off.get(key) if value is None else value for key, value in keys.items()}
    return {"temperature": "model" if own else asked, **chosen}


def other_sampling(section: Any, recipe: dict[str, Any] | None) -> bool:
    """Whether the verifier samples or verifies otherwise than in the run; greedy decoding has one way only."""
    if recipe is None or section.temperature == "model":
        return recipe is not None
    own = {key: recipe["benchmark"].get(key) for key in FILTERS}
    # Plans of older runs do not name the rule of verification.
    own["verification"] = recipe["benchmark"].get("verification", "token")
    return max(section.temperature) > 0 and any(value != getattr(section, key) for key, value in own.items())


def benchmark_section(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Reads `[benchmark]` of the run's own plan, with the command line's values in it."""
    from speculators.recipe.checks import suite_fault
    from speculators.recipe.schema import BenchmarkSection, Suite, suite_values
    from speculators.structure.converter import structure

    values: dict[str, Any] = {"suites": ["quickstart"]} if recipe is None else dict(recipe["benchmark"])
    changes = {"num_speculative_tokens": options.k, "live_prompts": options.live, **_sampling(options)}
    values |= {key: value for key, value in changes.items() if value is not None}
    # The recipe's trees are not for temperatures above 0, which a command may ask for alone.
    values["trees"] = options.tree or (values.get("trees", ()) if 0 in (options.temperature or [0]) else ())
    if options.suite:
        values["suites"] = [suite_values(name) for name in options.suite]
    if options.against:
        values["baselines"] = options.against.split(",")
    section, problems = structure(values, BenchmarkSection, path=("benchmark",))
    if section is None:
        raise RecipeError(problems)
    # Before the verifier is loaded, which takes minutes where it is large.
    if faults := [fault for suite in section.suites if (fault := suite_fault(suite))]:
        raise RecipeError([Problem("--suite" if options.suite else "benchmark.suites", *fault) for fault in faults])
    if not section.suites:
        raise RecipeError("the run's recipe names no suite (--suite quickstart measures on one)")
    if options.prompts:
        suites: tuple[Suite, ...] = tuple(attrs.evolve(suite, take=options.prompts) for suite in section.suites)
        section = attrs.evolve(section, suites=suites)
    return section
