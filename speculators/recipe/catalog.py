"""Recipes by name, from the installed package, or by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import attrs
import tomli

from speculators.errors import Problem, RecipeError
from speculators.recipe.input_sections import is_file_path
from speculators.recipe.schema import Suite
from speculators.registry import near_miss


def recipes_folder() -> Path:
    """Returns the folder of the recipes that come with the package."""
    return Path(str(resources.files("speculators.recipes")))


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package, sorted."""
    return sorted(file.stem for file in recipes_folder().glob("*.toml"))


def recipe_path(name_or_path: str) -> Path:
    """Returns the file of a recipe: of a catalogue name, or of a path (anything with a `/` or ending in `.toml`).

    Raises:
        RecipeError: there is no such recipe; tells the near miss.
    """
    if "/" not in name_or_path and not name_or_path.endswith(".toml"):
        if name_or_path in recipe_names():
            return recipes_folder() / f"{name_or_path}.toml"
        names = recipe_names()
        hint = (
            near_miss(name_or_path, names) or f"there are: {', '.join(names)}; a file is written ./{name_or_path}.toml"
        )
        raise RecipeError([Problem("", f"no recipe {name_or_path!r}", hint)])
    path = Path(name_or_path)
    try:
        path = path.expanduser()
        there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or ~ of nobody
        words = error.strerror if isinstance(error, OSError) else error
        raise RecipeError([Problem("", f"cannot be read: {words}", file=str(path))]) from None
    if not there:
        stem = path.stem if path.stem in recipe_names() else ""
        hint = (
            f"spec cp {stem} {name_or_path} makes it from the recipe {stem!r}" if stem else "spec ls lists the recipes"
        )
        found = "a folder" if path.is_dir() else "no such file"
        raise RecipeError([Problem("", found, hint, file=str(path))])
    return path


def suite_names() -> list[str]:
    """Returns the names of the benchmark suites that come with the package, sorted."""
    return sorted(file.stem for file in suites_folder().glob("*.toml"))


def suites_folder() -> Path:
    """Returns the folder of the benchmark suites that come with the package."""
    return Path(str(resources.files("speculators.benchmarks.suites")))


def resolved_suite(suite: Suite) -> Suite:
    """Returns a suite of the catalogue with the path that stands there, and split and take where the recipe says none.

    A relative path is looked for beside the suite, then among the recipes, from whose data a suite may be held out.
    """
    if suite.path is not None:
        return suite
    told = tomli.loads((suites_folder() / f"{suite.name}.toml").read_text(encoding="utf-8"))
    path = str(told["path"])
    if is_file_path(path):
        places = [folder / path for folder in (suites_folder(), recipes_folder())]
        path = str(next((place for place in places if place.is_file()), places[0]))
    return attrs.evolve(suite, path=path, split=suite.split or told.get("split"), take=suite.take or told.get("take"))
