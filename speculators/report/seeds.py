"""Runs by what distinguishes them: short labels for legends, and the spread over runs that differ in the seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import attrs

from speculators.bench.conclusion import reliable_speed_up
from speculators.bench.result import Setting
from speculators.diff.comparison import value_text

SEED = "seed"
# A legend with more values than this is harder to read than the names of the runs.
MOST_VALUES = 3
# Describe a recipe without changing any result.
_DESCRIPTION = ("name", "version", "summary", "hardware", "minutes", "expect")

Recipes = Sequence[Mapping[str, Any]]


def labels(names: Sequence[str], recipes: Recipes) -> list[str]:
    """Labels runs by the values in which their recipes differ, such as "seed=1"; by their names where that fails.

    Args:
        names: of the runs, unique.
        recipes: every value by its TOML path; empty for a run whose plan is damaged.
    """
    titles = [str(recipe.get("name")) for recipe in recipes]
    if len(set(titles)) == len(titles) > 1 and all(recipes):
        return titles
    keys = _differing(recipes)
    short = [key.rpartition(".")[2] for key in keys]
    made = [
        ", ".join(
            f"{end if short.count(end) == 1 else key}={value_text(recipe.get(key))}"
            for key, end in zip(keys, short, strict=True)
        )
        for recipe in recipes
    ]
    unclear = (
        not all(recipes) or not keys or len(keys) > MOST_VALUES or len(set(made)) < len(made) or len(set(titles)) > 1
    )
    return list(names) if unclear else made


def seed_groups(recipes: Recipes) -> list[list[int]]:
    """Groups the indices of runs that differ in the seed alone, two or more of them each."""
    groups: dict[str, dict[Any, int]] = {}
    for index, recipe in enumerate(recipes):
        if recipe:
            rest = str(sorted((key, value) for key, value in _results_of(recipe).items() if key != SEED))
            groups.setdefault(rest, {}).setdefault(recipe[SEED], index)
    return [list(by_seed.values()) for by_seed in groups.values() if len(by_seed) > 1]


@attrs.frozen(kw_only=True)
class SeedSpread:
    """The mean of a number over seeds, with its standard deviation and range."""

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedSpread:
        """Summarises two values or more."""
        return cls(mean=mean(values), deviation=stdev(values), low=min(values), high=max(values))


@attrs.frozen(kw_only=True)
class SeedRow:
    """One setting over seeds.

    Attributes:
        seeds: number of runs that measured it.
        speed_up: None where it was not measured reliably with every seed.
    """

    suite: str
    temperature: float
    num_speculative_tokens: int
    seeds: int
    tau: SeedSpread
    speed_up: SeedSpread | None


def seed_rows(settings: Sequence[Sequence[Setting]]) -> list[SeedRow]:
    """Summarises every setting that two runs or more measured on the same prompts.

    Args:
        settings: of each run of one group.
    """
    measured: dict[tuple[str, str, float, int], list[Setting]] = {}
    for of_run in settings:
        for each in of_run:
            key = (each.suite, each.prompts_digest, each.temperature, each.num_speculative_tokens)
            measured.setdefault(key, []).append(each)
    rows = []
    for (suite, _, temperature, k), same in measured.items():
        if len(same) > 1:
            timed = [pace for each in same if (pace := reliable_speed_up(each)) is not None]
            rows.append(
                SeedRow(
                    suite=suite,
                    temperature=temperature,
                    num_speculative_tokens=k,
                    seeds=len(same),
                    tau=SeedSpread.of([each.exact.tau for each in same]),
                    speed_up=SeedSpread.of(timed) if len(timed) == len(same) else None,
                )
            )
    return rows


def _differing(recipes: Recipes) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in _results_of(recipe))
    return [key for key in keys if len({value_text(recipe.get(key)) for recipe in recipes}) > 1]


def _results_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the values that a result may depend on."""
    return {key: value for key, value in recipe.items() if key.partition(".")[0] not in _DESCRIPTION}
