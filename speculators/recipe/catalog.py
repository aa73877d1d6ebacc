"""Finds recipes and suites: by name in the installed package, or by path."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

import attrs
import tomli

from speculators.errors import Problem, RecipeError
from speculators.recipe.input_sections import is_data_path
from speculators.recipe.schema import Suite
from speculators.registry import near_miss
from speculators.structure.converter import structure


@functools.cache
def recipes_folder() -> Path:
    """The folder of the recipes that come with the package."""
    return Path(str(resources.files("speculators.recipes")))


def recipe_names() -> list[str]:
    """Lists the recipes that come with the package, sorted."""
    return sorted(file.stem for file in recipes_folder().glob("*.toml"))


def recipe_path(name_or_path: str) -> Path:
    """Finds the file of a recipe, by its name in the catalogue or by path (with a `/`, or ending in `.toml`).

    Raises:
        RecipeError: there is no such recipe; names the near miss.
    """
    if "/" not in name_or_path and not name_or_path.endswith(".toml"):
        names = recipe_names()
        if name_or_path in names:
            return recipes_folder() / f"{name_or_path}.toml"
        hint = (
            near_miss(name_or_path, names)
            or f"available: {', '.join(names)}; write a file of your own as ./{name_or_path}.toml"
        )
        raise RecipeError([Problem("", f"no recipe {name_or_path!r}", hint)])
    path = Path(name_or_path)
    try:
        path = path.expanduser()
        exists = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or ~ of an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError([Problem("", f"cannot be read: {reason}", file=str(path))]) from None
    if not exists:
        hint = "spec ls lists the recipes"
        if path.stem in recipe_names():
            hint = f"spec cp {path.stem} {name_or_path} copies the recipe {path.stem!r} to it"
        message = "is a folder, not a file" if path.is_dir() else "no such file"
        raise RecipeError([Problem("", message, hint, file=str(path))])
    return path


def suite_names() -> list[str]:
    """Lists the benchmark suites that come with the package, sorted."""
    return sorted(file.stem for file in suites_folder().glob("*.toml"))


def suites_folder() -> Path:
    """The folder of the benchmark suites that come with the package."""
    return Path(str(resources.files("speculators.benchmarks.suites")))


def resolved_suite(suite: Suite) -> Suite:
    """Completes a suite of the catalogue, or of a file in its format: what the recipe does not set comes from there.

    A relative path is looked up beside the file, then among the recipes, whose data a suite may be held out from.

    Raises:
        RecipeError: the suite's file cannot be read; carries all its problems.
    """
    if suite.path is not None and not suite.path.endswith(".toml"):
        return suite
    file = Path(suite.path).expanduser() if suite.path else suites_folder() / f"{suite.name}.toml"
    whole = _suite_of(file)
    path = str(whole.path)
    if is_data_path(path):
        places = [folder / Path(path).expanduser() for folder in (file.parent, recipes_folder())]
        path = str(next((place for place in places if place.exists()), places[0]))
    own = attrs.asdict(suite, recurse=False, filter=lambda _, value: value is not None)
    return attrs.evolve(whole, **{**own, "path": path})


def _suite_of(file: Path) -> Suite:
    """Reads a suite's file."""
    try:
        entry = tomli.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise RecipeError([Problem("", f"cannot be read: {error}", file=str(file))]) from None
    values = {"name": file.stem} | {key: value for key, value in entry.items() if key != "summary"}
    suite, problems = structure(values, Suite, file=str(file))
    if suite is None:
        raise RecipeError(problems)
    if suite.path is None:
        hint = 'name the file or the data set: path = "rows.jsonl"'
        raise RecipeError([Problem("path", "is missing", hint, file=str(file))])
    return suite
