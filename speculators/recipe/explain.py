"""Explains a value of a recipe: where it was written, what it means, and which stages depend on it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.recipe.algorithm import AlgorithmSection
from speculators.recipe.schema import Recipe
from speculators.recipe.stages import StageInputs, stage_inputs
from speculators.recipe.values import as_tables, flatten, leaves
from speculators.structure.origin import Origin, Part, comment_at, path_text


@attrs.frozen(kw_only=True)
class Why:
    """One value, explained.

    Attributes:
        origin: file and line (after "extends" for an inherited value), "--set" or "default".
        means: the docstring of its key; "" if a plug-in has none.
        comment: the comment beside it in the recipe; "" if there is none.
        enters: stages whose fingerprints it is part of.
        reruns: stages that read the output of those.
        changed: one line for each file below the value that differs from what an earlier run read.
        replaces: for a `--set`, the recipe's own value ("value") and its place ("origin"); None if it has none.
    """

    path: str
    value: Any
    origin: str
    means: str
    comment: str
    enters: tuple[str, ...]
    reruns: tuple[str, ...]
    changed: tuple[str, ...] = ()
    replaces: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Converts all but the path to JSON values."""
        return attrs.asdict(self, filter=lambda field, _: field.name != "path")


def explain(recipe: Recipe, key: str, written: Recipe | None = None) -> list[Why]:
    """Explains the value at a path, or each value below it; [] if the recipe has no such path.

    Args:
        written: the recipe without its `--set` options; None if there are none, or if it is not valid without them.
    """
    explained, before = [], flatten(written) if written else {}
    stages = stage_inputs(recipe)
    for parts, value in leaves((), as_tables(recipe)):
        path = path_text(parts)
        if path == key or path.startswith((f"{key}.", f"{key}[")):
            origin = recipe.origins[path]
            enters, reruns = affected_stages(stages, path)
            explained.append(
                Why(
                    path=path,
                    value=value,
                    origin=str(origin),
                    means=meaning(recipe, parts),
                    comment=_comment(origin),
                    enters=enters,
                    reruns=reruns,
                    replaces=_replaced(path, origin, before, written),
                )
            )
    return explained


def _replaced(path: str, origin: Origin, before: Mapping[str, Any], written: Recipe | None) -> dict[str, Any] | None:
    if origin.kind != "--set" or written is None or path not in before:
        return None
    return {"value": before[path], "origin": str(written.origins[path])}


def affected_stages(stages: Sequence[StageInputs], path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names the stages that read a value themselves, and those that read the output of one that does."""
    enters: list[str] = []
    reruns: list[str] = []
    for stage in stages:
        if stage.reads(path):
            enters.append(stage.name)
        elif {*enters, *reruns} & {*stage.after}:
            reruns.append(stage.name)
    return tuple(enters), tuple(reruns)


def meaning(recipe: Recipe, parts: Sequence[Part]) -> str:
    """Finds what the docstrings say about the value at a path, or about the nearest table that holds it."""
    owner: Any = Recipe
    text = ""
    for part in parts:
        if isinstance(part, int) or not (isinstance(owner, type) and attrs.has(owner)):
            continue
        if owner is AlgorithmSection and part not in attrs.fields_dict(owner):
            owner = type(recipe.algorithm.config)
        text = _attribute_doc(owner, part) or text
        owner = _section_class(owner, part)
    return text


def _attribute_doc(owner: type, name: str) -> str:
    """The entry for a field in the "Attributes" of a class or of one that it derives from."""
    for cls in owner.__mro__:
        doc = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        if entry := re.search(rf"^    {re.escape(name)}: (.*(?:\n {{8}}.*)*)", doc, re.MULTILINE):
            return " ".join(entry[1].split())
    return ""


def _section_class(owner: type, name: str) -> Any:
    """The class of a field's value, or of the elements in it; None if it is not a section."""
    hint = typing.get_type_hints(owner).get(name)
    return next((part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and attrs.has(part)), None)


def _comment(origin: Origin) -> str:
    if origin.file is None or origin.line is None:
        return ""
    return comment_at(Path(origin.file).read_text(encoding="utf-8"), origin.line)
