"""Formats of recipe files: older ones are brought up to date on load, newer ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from speculators.errors import Problem, RecipeError

FORMAT = 1

# From each older format, the step to the next one. Steps take and return the whole document.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


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
