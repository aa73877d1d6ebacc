"""Converts a recipe to plain values by TOML path, and lists the paths that a recipe can have."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig
from speculators.recipe.algorithm import AlgorithmSection
from speculators.recipe.schema import Recipe
from speculators.structure.origin import Part, path_text

# Fields of Recipe that say where it was written and how it was read; they are not keys of the file.
PLACES = ("file", "origins", "notes")


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Maps the TOML path of each value of a recipe to the value, defaults included."""
    return flatten_tables(as_tables(recipe))


def flatten_tables(tables: dict[str, Any]) -> dict[str, Any]:
    """Maps the TOML path of each value in a recipe's tables to the value."""
    return {path_text(path): value for path, value in leaves((), tables)}


def as_tables(recipe: Recipe) -> dict[str, Any]:
    """Converts a recipe to the tables of its file, with the algorithm's own keys in `[algorithm]`."""
    plain = attrs.asdict(recipe, filter=lambda field, _: field.name not in PLACES)
    config = plain["algorithm"].pop("config")
    keys = [field.name for field in recipe.algorithm.config.recipe_fields()]
    plain["algorithm"].update({key: config[key] for key in keys})
    return plain


def leaves(path: tuple[Part, ...], value: Any) -> Iterator[tuple[tuple[Part, ...], Any]]:
    """Yields the path and value of everything that is not a table; a list without tables is one value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves((*path, key), item)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves((*path, index), item)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def known_paths(config_class: type[SpeculatorModelConfig] | None) -> list[str]:
    """Lists the path of every section and key that a recipe can have, except those inside lists."""
    own = [field.name for field in config_class.recipe_fields()] if config_class else []
    return [path_text(path) for path in _paths((), Recipe)] + [f"algorithm.{key}" for key in own]


def _paths(path: tuple[str, ...], cls: type) -> Iterator[tuple[str, ...]]:
    hints = typing.get_type_hints(cls)
    for field in attrs.fields(cls):
        if field.name in PLACES or (cls is AlgorithmSection and field.name == "config"):
            continue
        yield (*path, field.name)
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if isinstance(part, type) and attrs.has(part) and typing.get_origin(hints[field.name]) is not tuple:
                yield from _paths((*path, field.name), part)


def defaults(config_class: type[SpeculatorModelConfig] | None) -> dict[str, Any]:
    """Maps the TOML path of each key to its default; keys inside a list are written `data.sources[].take`.

    attrs.NOTHING stands for a required key.
    """
    own = config_class.recipe_fields() if config_class else ()
    return {**dict(_defaults("", Recipe)), **dict(_default_of("algorithm.", field) for field in own)}


def _defaults(prefix: str, cls: type) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in attrs.fields(cls):
        if field.name in PLACES or (cls is AlgorithmSection and field.name == "config"):
            continue
        yield _default_of(prefix, field)
        hint = hints[field.name]
        index = "[]" if typing.get_origin(hint) is tuple else ""
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and attrs.has(part):
                yield from _defaults(f"{prefix}{field.name}{index}.", part)


def _default_of(prefix: str, field: attrs.Attribute[Any]) -> tuple[str, Any]:
    default = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()  # type: ignore[union-attr]
    return f"{prefix}{field.name}", list(default) if isinstance(default, tuple) else default
