"""One side of a comparison, a recipe or a run: its values, where they were written, and what its stages read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import DataError
from speculators.facts import VerifierFacts
from speculators.recipe.fingerprint import file_hashes, source_identity, suite_identity, verifier_identity
from speculators.recipe.input_sections import DataSource
from speculators.recipe.plan import Plan, read_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.stages import Stage
from speculators.recipe.values import flatten, flatten_tables
from speculators.runs.places import RunFolder

# Suite, K, T.
SettingKey = tuple[str, int, float]


@attrs.frozen
class Conditions:
    """How one setting was measured: the definition of tau, and the precision in which the verifier computed."""

    definition: str
    dtype: str


@attrs.frozen(kw_only=True)
class DiffSide:
    """One of the two recipes or runs that `spec diff` compares.

    Attributes:
        name: as the user typed it.
        values: every value by its TOML path, defaults included.
        origins: where each value was written.
        contents: sha256 of the files that a path in `values` names, where they are known: by name within a folder, ""
            for a path that names one file.
        stages: by name; empty where the verifier is not known.
        facts: the verifier's config.json, where it is known.
        plan: None for runs, and for recipes whose verifier is not known.
        parameters: parameters of the speculator by size of its draft vocabulary, where they were counted.
        precision: what a run trained in; None for recipes and for runs that predate this field.
        run: the run folder; None for a recipe.
        conditions: how a run measured each setting.
        notes: what was not read as the user named it.
    """

    name: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    contents: Mapping[str, Mapping[str, str]]
    stages: Mapping[str, Stage] = attrs.field(factory=dict)
    facts: VerifierFacts | None = None
    plan: Plan | None = None
    parameters: Mapping[int, int] = attrs.field(factory=dict)
    precision: str | None = None
    run: Path | None = None
    conditions: Mapping[SettingKey, Conditions] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of_recipe(cls, name: str, recipe: Recipe, plan: Plan | None = None) -> DiffSide:
        """Describes a recipe; its stages are known only with a plan."""
        # asdict turns tuples into lists, so that inputs compare with those that a run wrote as JSON.
        stages = {stage.name: Stage(**attrs.asdict(stage)) for stage in plan.stages} if plan else {}
        return cls(
            name=name,
            values=flatten(recipe),
            origins={path: str(origin) for path, origin in recipe.origins.items()},
            contents=_planned_contents(stages) if plan else _contents_now(recipe),
            stages=stages,
            facts=plan.facts if plan else None,
            plan=plan,
        )

    @classmethod
    def of_run(cls, name: str, folder: Path) -> DiffSide:
        """Describes a run from its plan.json; a plan that predates origins is itself the origin of every value.

        Raises:
            ArtifactError: `plan.json` is missing or damaged.
        """
        file = RunFolder(folder).plan
        plan = read_plan(file)
        values, origins = flatten_tables(plan["recipe"]), plan.get("origins")
        stages = {
            stage["name"]: Stage(stage["name"], stage["fingerprint"], stage["inputs"]) for stage in plan["stages"]
        }
        return cls(
            name=name,
            values=values,
            origins={path: origins.get(path, "default") if origins else str(file) for path in values},
            contents=_planned_contents(stages),
            stages=stages,
            precision=plan.get("precision"),
            run=folder,
        )


def _planned_contents(stages: Mapping[str, Stage]) -> dict[str, Mapping[str, str]]:
    """Takes the hashes that a plan computed."""
    prepare = stages["prepare"].inputs
    return _hashes(stages["verifier"].inputs, prepare["sources"], prepare["held_out"])


def _contents_now(recipe: Recipe) -> dict[str, Mapping[str, str]]:
    """Hashes the files of a recipe that has no plan, skipping files that are not there."""
    verifier = recipe.verifier
    suites = [suite_identity(suite) for suite in recipe.benchmark.suites]
    sources = [_identity_now(source) for source in recipe.data.sources]
    local = verifier.kind == "gguf" and Path(verifier.model).is_file()
    return _hashes(verifier_identity(verifier) if local or verifier.sha256 else {}, sources, suites)


def _identity_now(source: DataSource) -> Mapping[str, Any]:
    try:
        return source_identity(source)
    except DataError:  # its files are not there
        return {}


def _hashes(verifier: Mapping[str, Any], sources: Any, suites: Any) -> dict[str, Mapping[str, str]]:
    identities = [("verifier.model", verifier)]
    identities += [(f"data.sources[{index}].path", source) for index, source in enumerate(sources)]
    identities += [(f"benchmark.suites[{index}].path", suite) for index, suite in enumerate(suites)]
    return {path: hashes for path, identity in identities if (hashes := file_hashes(identity))}
