"""The documents that a recipe is made of, one over the other: what it extends, itself, the `--set` options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomli

from speculators.errors import Problem, RecipeError
from speculators.recipe.catalog import recipe_path
from speculators.structure.origin import Origin, Part, key_lines, nearest_line

FORMAT = 1

# From each older format, the step to the next one. Steps take and return the whole document.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

# What belongs to the one recipe that says it: its identity, and bands that were measured with it.
_NOT_INHERITED = ("extends", "name", "version", "summary", "expect")
# What `--set` may say without making another recipe of it, for which the bands were not measured.
_LEAVES_BANDS = {"name", "version", "summary", "hardware", "seed", "tracking", "reproduce", "expect"}


def migrate(document: dict[str, Any], to: int = FORMAT, *, file: str | None = None) -> dict[str, Any]:
    """Returns the document in format `to`.

    Raises:
        RecipeError: no format, not an integer, newer than `to`, or so old that no migration is left.
    """
    found = document.get("format")
    if found is None:
        problem = Problem("format", "is missing", f"write format = {to} in the first line", file)
    elif isinstance(found, bool) or not isinstance(found, int):
        problem = Problem("format", f"must be an integer, got {found!r}", f"write format = {to}", file)
    elif found > to:
        from importlib import metadata

        version = metadata.version("spec-recipes")
        message = f"{found} is newer than this program: spec-recipes {version} reads formats up to {to}"
        problem = Problem("format", message, f"install a version of spec-recipes that reads format {found}", file)
    elif missing := [old for old in range(found, to) if old not in MIGRATIONS]:
        oldest = min([*MIGRATIONS, to])
        message = f"{found} is too old: this program reads formats from {oldest} to {to}, nothing from {missing[0]} on"
        problem = Problem("format", message, "", file)
    else:
        for old in range(found, to):
            document = {**MIGRATIONS[old](document), "format": old + 1}
        return document
    raise RecipeError([problem])


@attrs.frozen
class Layer:
    """One document that a recipe is made of.

    Attributes:
        kind: "extends", "recipe" or "--set", as in Origin.
        lines: line of each path.
        folder: what relative paths in it are relative to.
    """

    kind: str
    data: dict[str, Any]
    lines: Mapping[tuple[Part, ...], int]
    file: str | None
    folder: Path


def read_document(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the migrated document of a TOML file, and its text.

    Raises:
        RecipeError: it cannot be read, is not TOML, or has a format that cannot be read.
    """
    name = _display(path)
    try:
        text = path.read_text(encoding="utf-8")
        return migrate(tomli.loads(text), file=name), text
    except UnicodeDecodeError:
        raise RecipeError([Problem("", "is not a text file (UTF-8)", file=name)]) from None
    except OSError as error:
        raise RecipeError([Problem("", f"cannot be read: {error.strerror}", file=name)]) from None
    except tomli.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        problem = Problem("", f"is not TOML: {error}", file=name, line=int(line.group(1)) if line else None)
        raise RecipeError([problem]) from None


def read_layers(path: Path, overrides: Sequence[str]) -> list[Layer]:
    """Returns the documents of a recipe, later over earlier: what it extends, itself, the `--set` options."""
    data, text = read_document(path)
    own = Layer("recipe", data, key_lines(text), _display(path), path.parent)
    layers = [own]
    if "extends" in data:
        layers.insert(0, _base(own))
    if overrides:
        said = overrides_table(overrides)
        if said.keys() - _LEAVES_BANDS:
            layers = [_without(layer, "expect") for layer in layers]
        layers.append(Layer("--set", said, {}, None, Path.cwd()))
    return [_without_other_algorithm(layer, layers[index + 1 :]) for index, layer in enumerate(layers)]


def _base(own: Layer) -> Layer:
    """Returns the layer that `own` extends: a name of the catalogue, or a file relative to `own`."""
    where = own.file, nearest_line(own.lines, ("extends",))
    told = own.data["extends"]
    if not isinstance(told, str):
        raise RecipeError([Problem("extends", f"must be a string, got {told!r}", "", *where)])
    try:
        is_name = "/" not in told and not told.endswith(".toml")
        path = recipe_path(told if is_name else str(own.folder / Path(told).expanduser()))
    except RecipeError as error:
        problem = error.problems[0]
        place = f"{problem.file}: " if problem.file else ""
        raise RecipeError([Problem("extends", place + problem.message, problem.hint, *where)]) from None
    data, text = read_document(path)
    if "extends" in data:
        message = f"{told!r} itself extends {data['extends']!r}; one level is allowed"
        raise RecipeError([Problem("extends", message, f"extend {data['extends']!r} instead", *where)])
    data = {key: value for key, value in data.items() if key not in _NOT_INHERITED}
    return Layer("extends", data, key_lines(text), _display(path), path.parent)


def overrides_table(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the document that the `--set` options make; raises RecipeError with all that cannot be one."""
    data: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            statement = tomli.loads(override)
        except tomli.TOMLDecodeError as error:
            hint = "write section.key=value"
            if equals:
                hint = f"a string needs quotes: --set '{key.strip()}=\"{value.strip()}\"'"
            if "[" in key:
                hint = "a list is replaced as a whole"
            problems.append(Problem(f"--set {override}", f"is not TOML: {error}", hint))
        else:
            if "format" in statement:
                hint = "write it into the file, or leave it out"
                problems.append(Problem(f"--set {override}", "format says how the file is written: no value", hint))
            data = merge(data, statement)
    if problems:
        raise RecipeError(problems)
    return data


def _without_other_algorithm(layer: Layer, over: Sequence[Layer]) -> Layer:
    """Drops the [algorithm] of a layer when a later one names another algorithm, whose keys are others."""
    own = layer.data.get("algorithm")
    for later in over:
        table = later.data.get("algorithm")
        if isinstance(own, dict) and isinstance(table, dict) and table.get("name", own.get("name")) != own.get("name"):
            return _without(layer, "algorithm")
    return layer


def _without(layer: Layer, section: str) -> Layer:
    return attrs.evolve(layer, data={key: value for key, value in layer.data.items() if key != section})


def merge(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the documents as one, later over earlier, table by table; a list replaces a list."""
    merged: dict[str, Any] = {}
    for document in documents:
        for key, value in document.items():
            held = merged.get(key)
            merged[key] = merge(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def locate(layers: Sequence[Layer], path: tuple[Part, ...]) -> Origin:
    """Returns where a value was written; for one that is missing, where the table that lacks it was."""
    whole = path
    while path:
        for layer in reversed(layers):
            if holds(layer.data, path):
                return Origin(layer.kind, layer.file, nearest_line(layer.lines, path))
        path = path[:-1]
    own = next(layer for layer in layers if layer.kind == "recipe")
    return Origin("recipe", own.file, 1 if not whole else None)


def holds(value: Any, path: tuple[Part, ...]) -> bool:
    """Returns whether a document says something at a path."""
    for part in path:
        if isinstance(part, int):
            if not isinstance(value, list) or part >= len(value):
                return False
        elif isinstance(value, str) and part == "name":
            continue  # a bare text may stand for a table with that name
        elif not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _display(path: Path) -> str:
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)
