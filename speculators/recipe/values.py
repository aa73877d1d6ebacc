"""A recipe as plain values by TOML path, and the paths that exist."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig
from speculators.recipe.algorithm import AlgorithmSection
from speculators.recipe.schema import Recipe
from speculators.structure.origin import Part, path_text

# Fields of Recipe that say where it was written: not keys of the file.
PLACES = ("file", "origins")


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Returns every value of a recipe by its TOML path, defaults included."""
    return flatten_tables(as_tables(recipe))


def flatten_tables(tables: dict[str, Any]) -> dict[str, Any]:
    """Returns every value of a recipe's tables by its TOML path."""
    return {path_text(path): value for path, value in leaves((), tables)}


def as_tables(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as tables, with the algorithm's own keys where they are written."""
    plain = attrs.asdict(recipe, filter=lambda field, _: field.name not in PLACES)
    config = plain["algorithm"].pop("config")
    keys = [field.name for field in recipe.algorithm.config.recipe_fields()]
    plain["algorithm"].update({key: config[key] for key in keys})
    return plain


def leaves(path: tuple[Part, ...], value: Any) -> Iterator[tuple[tuple[Part, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves((*path, key), item)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves((*path, index), item)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def known_paths(config_class: type[SpeculatorModelConfig] | None) -> list[str]:
    """Returns the path of every section and key that a recipe can have, those inside lists left out."""
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
    """Returns the default of every key by its TOML path: of what is in a list at `data.sources[].take`.

    attrs.NOTHING stands for a key that must be said.
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
    """Returns a key with its default as JSON tells it; attrs.NOTHING where it must be said."""
    default = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()  # type: ignore[union-attr]
    return f"{prefix}{field.name}", list(default) if isinstance(default, tuple) else default
