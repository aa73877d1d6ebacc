"""Writes a loaded recipe as a TOML file that says everything by itself: what a run keeps of the recipe that it ran."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.recipe.catalog import recipes_folder
from speculators.recipe.load import reads_as
from speculators.recipe.schema import Recipe
from speculators.recipe.values import as_tables, defaults, leaves
from speculators.structure.origin import Part, path_text
from speculators.structure.spelling import toml_key, toml_text


def effective_text(recipe: Recipe, path: Path, changes: Mapping[str, Any]) -> str:
    """Spells a recipe as the text of a file at `path`: its author's text where that means the same there, comments and
    all, otherwise every value that differs from its default, with files by absolute path.

    Args:
        changes: values that came from the command line, by TOML path; a comment names them.
    """
    own = _authors_text(recipe)
    if own is not None and reads_as(own, path, recipe):
        return own
    # A run that goes on reads its own files, whose names say nothing.
    is_authors = recipe.file is not None and recipe.file.suffix == ".toml" and recipe.file.parent != path.parent
    origin = f" ({recipe.file.name})" if recipe.file is not None and is_authors else ""
    lines = [f"# The effective recipe of this run: {recipe.name}{origin}."]
    if changes:
        lines.append("# Changed on the command line:")
        lines += [f"#   {key} = {toml_text(value)}" for key, value in changes.items()]
    return "\n".join([*lines, "", *_document_lines(written_tables(recipe))]) + "\n"


def _authors_text(recipe: Recipe) -> str | None:
    """Reads the recipe's file; None where there is none, or where it needs another file."""
    if recipe.file is None or recipe.file.suffix != ".toml" or recipe.extends is not None:
        return None
    try:
        return recipe.file.read_text(encoding="utf-8")
    except OSError:  # removed since it was loaded
        return None


def written_tables(recipe: Recipe) -> dict[str, Any]:
    """Collects the values of a recipe that its author wrote or that differ from their defaults, as nested tables."""
    known = defaults(type(recipe.algorithm.config))
    whole = as_tables(attrs.evolve(recipe, extends=None))
    document: dict[str, Any] = {}
    for path, value in leaves((), whole):
        text = path_text(path)
        origin = recipe.origins.get(text)
        is_default = known.get(re.sub(r"\[\d+\]", "[]", text), attrs.NOTHING) == value
        if not is_default or (value is not None and origin is not None and origin.kind != "default"):
            _put(document, path, "none" if value is None else _portable(value))
    return document


def _put(document: dict[str, Any], path: tuple[Part, ...], value: Any) -> None:
    """Puts a value at a path, making the tables and lists on the way."""
    place: Any = document
    for part, following in zip(path, (*path[1:], None), strict=True):
        new: Any = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(part, int):
            if part == len(place):
                place.append(new)
        elif part not in place:
            place[part] = new
        place = place[part]


def _portable(value: Any) -> Any:
    """Names a file that comes with the package as recipes do, so that it is found wherever the package lies."""
    shipped = recipes_folder().resolve()
    if isinstance(value, str) and value.startswith(f"{shipped}/"):
        return Path(value).relative_to(shipped).as_posix()
    return value


def _document_lines(document: Mapping[str, Any]) -> list[str]:
    """Spells a document: its own values, then one block for each section."""
    lines = [f"{toml_key(key)} = {toml_text(value)}" for key, value in document.items() if not isinstance(value, dict)]
    for key, value in document.items():
        if isinstance(value, dict):
            lines += ["", f"[{toml_key(key)}]"]
            lines += [f"{toml_key(name)} = {toml_text(item)}" for name, item in value.items()]
    return lines
