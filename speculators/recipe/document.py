"""Reads the documents that make up a recipe (the file it extends, itself, `--set`) and merges them in that order."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomli

from speculators.errors import Problem, RecipeError
from speculators.recipe.catalog import recipe_path, recipes_folder
from speculators.structure.origin import Origin, Part, key_lines, nearest_line

FORMAT = 1

# The step from each older format to the next; a step takes and returns the whole document.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

# These belong to one recipe alone: its identity, and the bands that were measured with it.
_NOT_INHERITED = ("extends", "name", "version", "summary", "minutes", "expect")
# What was measured with a recipe, and says nothing about another.
_MEASURED = ("minutes", "expect")
# `--set` may change these and keep what was measured; any other change makes another recipe.
_LEAVES_BANDS = {"name", "version", "summary", "hardware", "minutes", "seed", "tracking", "reproduce", "expect"}


def migrate(document: dict[str, Any], to: int = FORMAT, *, file: str | None = None) -> dict[str, Any]:
    """Brings a document to format `to`, one format at a time.

    Raises:
        RecipeError: the format is missing, not an integer, newer than `to`, or too old to migrate.
    """
    written = document.get("format")
    if written is None:
        problem = Problem("format", "is missing", f"write format = {to} in the first line", file)
    elif isinstance(written, bool) or not isinstance(written, int):
        problem = Problem("format", f"must be an integer, got {written!r}", f"write format = {to}", file)
    elif written > to:
        from importlib import metadata

        version = metadata.version("spec-recipes")
        message = f"{written} is newer than this program: spec-recipes {version} reads formats up to {to}"
        problem = Problem("format", message, f"install a version of spec-recipes that reads format {written}", file)
    elif missing := [old for old in range(written, to) if old not in MIGRATIONS]:
        oldest = min([*MIGRATIONS, to])
        message = f"{written} is too old: this program reads formats {oldest} to {to} and has no step from {missing[0]}"
        problem = Problem("format", message, "", file)
    else:
        for old in range(written, to):
            document = {**MIGRATIONS[old](document), "format": old + 1}
        return document
    raise RecipeError([problem])


def with_present_keys(document: dict[str, Any]) -> dict[str, Any]:
    """Writes the value of a former key under its present name: `data.server.endpoint` became the list `endpoints`."""
    data = document.get("data")
    server = data.get("server") if isinstance(data, dict) else None
    if not (isinstance(data, dict) and isinstance(server, dict)) or "endpoint" not in server or "endpoints" in server:
        return document
    kept = {key: value for key, value in server.items() if key != "endpoint"}
    return {**document, "data": {**data, "server": {**kept, "endpoints": [server["endpoint"]]}}}


@attrs.frozen
class Layer:
    """One of the documents that make up a recipe.

    Attributes:
        kind: "extends", "recipe" or "--set", as in Origin.
        lines: line of each path.
        folder: where relative paths in it start.
    """

    kind: str
    data: dict[str, Any]
    lines: Mapping[tuple[Part, ...], int]
    file: str | None
    folder: Path


def read_document(path: Path) -> tuple[dict[str, Any], str]:
    """Reads a TOML file as a document in the current format, together with its text.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or has an unknown format.
    """
    data, text = read_toml(path)
    return migrate(data, file=shown_path(path)), text


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Reads a TOML file of any kind, together with its text.

    Raises:
        RecipeError: the file cannot be read, or is not TOML.
    """
    name = shown_path(path)
    try:
        text = path.read_text(encoding="utf-8")
        return tomli.loads(text), text
    except UnicodeDecodeError:
        raise RecipeError([Problem("", "is not a text file (UTF-8)", file=name)]) from None
    except OSError as error:
        raise RecipeError([Problem("", f"cannot be read: {error.strerror}", file=name)]) from None
    except tomli.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        problem = Problem("", f"is not TOML: {error}", file=name, line=int(line.group(1)) if line else None)
        raise RecipeError([problem]) from None


def read_layers(path: Path, overrides: Sequence[str], folder: Path | None = None) -> list[Layer]:
    """Reads the documents of a recipe, lowest priority first: the file it extends, itself, the `--set` options.

    Args:
        folder: where relative paths in the options start; None for the working folder.
    """
    data, text = read_document(path)
    return layers_over(Layer("recipe", data, key_lines(text), shown_path(path), path.parent), overrides, folder)


def text_layer(text: str, path: Path) -> Layer:
    """Makes the document that a file of this text would be; raises as `read_document` does."""
    return Layer("recipe", migrate(tomli.loads(text)), key_lines(text), shown_path(path), path.parent)


def tables_layer(tables: Mapping[str, Any], path: Path) -> Layer:
    """Makes a document of the tables of a loaded recipe, as the JSON file `path` keeps them."""
    data = migrate({key: value for key, value in tables.items() if key != "extends"}, file=str(path))
    # Tables have None for "no plug-in", where a document has no key.
    algorithm = {key: value for key, value in data["algorithm"].items() if (key, value) != ("module", None)}
    return Layer("recipe", {**data, "algorithm": algorithm}, {}, shown_path(path), path.parent)


def layers_over(own: Layer, overrides: Sequence[str], folder: Path | None = None) -> list[Layer]:
    """Puts what a document extends below it, and the `--set` options above, as `read_layers` does."""
    layers = [own]
    if "extends" in own.data:
        layers.insert(0, _base(own))
    if overrides:
        changes = overrides_table(overrides)
        if changes.keys() - _LEAVES_BANDS:
            layers = [_without(layer, *_MEASURED) for layer in layers]
        layers.append(Layer("--set", changes, {}, None, folder or Path.cwd()))
    return [_without_other_algorithm(layer, layers[index + 1 :]) for index, layer in enumerate(layers)]


def _base(own: Layer) -> Layer:
    """Reads what `own` extends: a recipe of the catalogue, or a file relative to `own`."""
    where = own.file, nearest_line(own.lines, ("extends",))
    base = own.data["extends"]
    if not isinstance(base, str):
        raise RecipeError([Problem("extends", f"must be a string, got {base!r}", "", *where)])
    try:
        is_name = "/" not in base and not base.endswith(".toml")
        path = recipe_path(base if is_name else str(own.folder / Path(base).expanduser()))
    except RecipeError as error:
        problem = error.problems[0]
        place = f"{problem.file}: " if problem.file else ""
        raise RecipeError([Problem("extends", place + problem.message, problem.hint, *where)]) from None
    data, text = read_document(path)
    if "extends" in data:
        message = f"{base!r} itself extends {data['extends']!r}; only one level is allowed"
        raise RecipeError([Problem("extends", message, f"extend {data['extends']!r} instead", *where)])
    data = {key: value for key, value in data.items() if key not in _NOT_INHERITED}
    return Layer("extends", data, key_lines(text), shown_path(path), path.parent)


def overrides_table(overrides: Sequence[str]) -> dict[str, Any]:
    """Parses the `--set` options into one document; raises RecipeError with every option that is not TOML."""
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
                message = "format describes how the file is written and cannot be set"
                problems.append(Problem(f"--set {override}", message, "leave it out, or edit the file"))
            data = merge(data, statement)
    if problems:
        raise RecipeError(problems)
    return data


def _without_other_algorithm(layer: Layer, over: Sequence[Layer]) -> Layer:
    """Drops the [algorithm] of a layer if a later layer names another algorithm, which has other keys."""
    own = layer.data.get("algorithm")
    for later in over:
        table = later.data.get("algorithm")
        if isinstance(own, dict) and isinstance(table, dict) and table.get("name", own.get("name")) != own.get("name"):
            return _without(layer, "algorithm")
    return layer


def _without(layer: Layer, *keys: str) -> Layer:
    return attrs.evolve(layer, data={key: value for key, value in layer.data.items() if key not in keys})


def merge(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Merges documents, later over earlier, table by table; a list replaces a list."""
    merged: dict[str, Any] = {}
    for document in documents:
        for key, value in document.items():
            earlier = merged.get(key)
            merged[key] = merge(earlier, value) if isinstance(earlier, dict) and isinstance(value, dict) else value
    return merged


def locate(layers: Sequence[Layer], path: tuple[Part, ...]) -> Origin:
    """Finds where a value was written; for a missing value, where the table that lacks it was written."""
    whole = path
    while path:
        for layer in reversed(layers):
            if holds(layer.data, path):
                return Origin(layer.kind, layer.file, nearest_line(layer.lines, path), _short(layer.file))
        path = path[:-1]
    own = next(layer for layer in layers if layer.kind == "recipe")
    return Origin("recipe", own.file, 1 if not whole else None, _short(own.file))


def holds(value: Any, path: tuple[Part, ...]) -> bool:
    """Whether a document has a value at a path."""
    for part in path:
        if isinstance(part, int):
            if not isinstance(value, list) or part >= len(value):
                return False
        elif isinstance(value, str) and part == "name":
            continue  # a bare text may stand for a table with this name
        elif not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


@functools.cache
def _short(file: str | None) -> str:
    """The name alone of a recipe that ships with the package, wherever that lies; "" for any other."""
    shipped = file is not None and Path(file).resolve().parent == recipes_folder().resolve()
    return Path(file).name if file is not None and shipped else ""


def shown_path(path: Path) -> str:
    """Writes the path of a file as messages show it: from the working folder, if it lies there."""
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)
