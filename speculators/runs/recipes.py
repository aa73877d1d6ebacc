"""The recipe of a run: kept in its folder as it was run, and loaded from there to go on with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speculators.errors import Problem, RecipeError
from speculators.files.disk import file_sha256, read_json, write_json, write_whole
from speculators.recipe.algorithm import remember_plugin
from speculators.recipe.document import read_document
from speculators.recipe.load import load_recipe, load_tables
from speculators.recipe.plan import Plan, read_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten, flatten_tables
from speculators.recipe.written import effective_text
from speculators.runs.places import RUNS, RunFolder, find_recipe

# In plan.json: the sha256 of the recipe.toml written with it. Runs that predate it kept their author's file.
TEXT_HASH = "recipe_sha256"
OVERRIDE = "--set"


def keep_recipe(run: RunFolder, plan: Plan) -> None:
    """Writes into a run folder the recipe as it is run, its plan, and where its plug-in lies."""
    recipe, document = plan.recipe, plan.to_dict()
    if recipe.file is not None and recipe.file.resolve() in (run.recipe.resolve(), run.plan.resolve()):
        # Goes on from its own file: where its values were first written is still where they come from.
        new = {path: origin for path, origin in document["origins"].items() if origin == OVERRIDE}
        document["origins"] = {**_origins(run), **new}
    values = flatten(recipe)
    changes = {path: values[path] for path, origin in document["origins"].items() if origin == OVERRIDE}
    text = effective_text(recipe, run.recipe, changes).encode()
    write_whole(run.recipe, text)
    write_json(run.plan, {**document, TEXT_HASH: hashlib.sha256(text).hexdigest()})
    if recipe.algorithm.module is not None:
        remember_plugin(recipe.algorithm.module, run.path)


def _origins(run: RunFolder) -> dict[str, str]:
    document = read_json(run.plan)
    origins = document.get("origins") if isinstance(document, dict) else None
    return dict(origins) if isinstance(origins, dict) else {}


def changed_values(run: RunFolder) -> dict[str, Any]:
    """Reads the values of a run that came from the command line, by TOML path; {} where its plan cannot be read."""
    document = read_json(run.plan)
    if not isinstance(document, dict) or not isinstance(document.get("recipe"), dict):
        return {}
    values = flatten_tables(document["recipe"])
    return {path: values[path] for path, origin in _origins(run).items() if origin == OVERRIDE and path in values}


def load_run(run: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """Loads the recipe that a run ran, with the overrides of its command line, and then those given here.

    Raises:
        RecipeError: the recipe in the folder was edited since, or does not load.
        ArtifactError: plan.json is missing or damaged.
    """
    plan = read_plan(run.plan)
    if TEXT_HASH not in plan:
        return load_tables(plan["recipe"], run.plan, overrides)
    if not run.recipe.is_file() or file_sha256(run.recipe) != plan[TEXT_HASH]:
        hint = f"spec run {run.recipe} runs the edited file; remove it to use the recipe in plan.json"
        if run.recipe.is_file():
            raise RecipeError([Problem("", "was edited since this run", hint, str(run.recipe))])
        return load_tables(plan["recipe"], run.plan, overrides)
    return load_recipe(str(run.recipe), overrides)


def recipe_text(place: Path | RunFolder) -> str:
    """Reads the text of a recipe's file, or spells the recipe that a run ran; raises as `load_any` does."""
    if isinstance(place, RunFolder):
        return effective_text(load_run(place), place.recipe, changed_values(place))
    return read_document(place)[1]


def load_any(text: str, overrides: Sequence[str] = (), runs: Path = RUNS) -> tuple[Recipe, RunFolder | None]:
    """Loads a recipe by its name or file, or the recipe of a run (see `find_recipe`), which is returned, too.

    Raises:
        RecipeError: there is neither, or the recipe is not valid.
    """
    place = find_recipe(text, runs)
    if isinstance(place, RunFolder):
        return load_run(place, overrides), place
    return load_recipe(text, overrides), None
