"""One of two recipes or runs that are compared: its values, where they come from, and what its stages read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.facts import VerifierFacts
from speculators.recipe.fingerprint import source_identity, suite_identity, verifier_identity
from speculators.recipe.plan import Plan, read_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten, flatten_tables

# Suite, K, T.
Setting = tuple[str, int, float]


@attrs.frozen(kw_only=True)
class Side:
    """One of two recipes or runs.

    Attributes:
        name: as it was asked for.
        values: every value by its TOML path, defaults included.
        origins: where each was written.
        contents: sha256 of what a path in `values` stands for, where it is known: of a file, or of a suite's file.
        stages: fingerprint and inputs of each stage; empty where the verifier is not known.
        facts: the verifier's config.json, where it is known.
        plan: of a recipe, where its verifier is known.
        parameters: of the speculator with draft vocabularies of these sizes, where they were counted.
        precision: what a run trained in; None for a recipe, and for a run of before this was kept.
        run: its folder, None for a recipe.
        measured: of a run, the definition and the verifier's precision that each setting was measured with.
        notes: what of it is not as it was asked for.
    """

    name: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    contents: Mapping[str, str]
    stages: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    facts: VerifierFacts | None = None
    plan: Plan | None = None
    parameters: Mapping[int, int] = attrs.field(factory=dict)
    precision: str | None = None
    run: Path | None = None
    measured: Mapping[Setting, Mapping[str, str]] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of_recipe(cls, name: str, recipe: Recipe, plan: Plan | None = None) -> Side:
        """Returns a recipe's side; with a plan its stages are known."""
        stages = {stage.name: attrs.asdict(stage) for stage in plan.stages} if plan else {}
        return cls(
            name=name,
            values=flatten(recipe),
            origins={path: str(origin) for path, origin in recipe.origins.items()},
            contents=_contents(stages) if plan else _contents_here(recipe),
            stages=stages,
            facts=plan.facts if plan else None,
            plan=plan,
        )

    @classmethod
    def of_run(cls, name: str, folder: Path) -> Side:
        """Returns a run's side, from what it wrote down; one of before origins were kept has the file for each.

        Raises:
            ArtifactError: `plan.json` is missing or damaged.
        """
        plan = read_plan(folder)
        values, kept = flatten_tables(plan["recipe"]), plan.get("origins")
        stages = {stage["name"]: stage for stage in plan["stages"]}
        return cls(
            name=name,
            values=values,
            origins={path: kept.get(path, "default") if kept else str(folder / "plan.json") for path in values},
            contents=_contents(stages),
            stages=stages,
            precision=plan.get("precision"),
            run=folder,
        )


def _contents(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the content of each path that a plan hashed."""
    prepare = stages["prepare"]["inputs"]
    return _hashed(stages["verifier"]["inputs"], prepare["sources"], prepare["held_out"])


def _contents_here(recipe: Recipe) -> dict[str, str]:
    """Returns the content of each path of a recipe whose verifier is not known; a file that is not there has none."""
    verifier = recipe.verifier
    suites = [suite_identity(suite) for suite in recipe.benchmark.suites]
    sources = [
        source_identity(source) if source.is_file and Path(source.path).is_file() else {}
        for source in recipe.data.sources
    ]
    local = verifier.kind == "gguf" and Path(verifier.model).is_file()
    return _hashed(verifier_identity(verifier) if local or verifier.sha256 else {}, sources, suites)


def _hashed(verifier: Mapping[str, Any], sources: Any, suites: Any) -> dict[str, str]:
    named = [("verifier.model", verifier)]
    named += [(f"data.sources[{index}].path", source) for index, source in enumerate(sources)]
    named += [(f"benchmark.suites[{index}].path", suite) for index, suite in enumerate(suites)]
    return {path: identity["sha256"] for path, identity in named if "sha256" in identity}
