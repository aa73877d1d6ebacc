"""Why a value is what it is: where it was written, what it means, and which stages it decides."""

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
from speculators.recipe.values import as_tables, flatten, leaves
from speculators.structure.origin import Origin, Part, comment_at, path_text

# What each part of a recipe enters as itself, the longest prefix first; tests/recipe/test_explain.py holds it against
# the plan. What follows from `regenerate` and `hidden_states` is in `enters`.
_ENTERS: dict[str, tuple[str, ...]] = {
    "verifier": ("verifier",),
    "data": ("prepare",),
    "data.hidden_states": ("train",),
    "data.server": (),
    "algorithm": ("train",),
    "algorithm.module": (),
    "schedule": ("train",),
    "schedule.checkpoint_every": (),
    "schedule.keep_checkpoints": (),
    "seed": ("train",),
    "benchmark": ("bench",),
    # Their prompts are kept out of the data, and the best checkpoint is chosen on the first.
    "benchmark.suites": ("prepare", "train", "bench"),
    # The best checkpoint is chosen at the largest K and the first temperature.
    "benchmark.num_speculative_tokens": ("train", "bench"),
    "benchmark.temperature": ("train", "bench"),
}
_READS = {"verifier": (), "prepare": ("verifier",), "capture": ("verifier", "prepare"), "bench": ("train", "verifier")}


@attrs.frozen(kw_only=True)
class Why:
    """One value, explained.

    Attributes:
        origin: file and line, "extends" with them, "--set" or "default".
        means: what its class says of it; "" where an algorithm of one's own does not.
        comment: what the recipe says beside it; "" for nothing.
        enters: stages whose fingerprints it is part of.
        reruns: stages that read what those write.
        replaces: of a `--set`, what the recipe itself has there ("value") and where that stands ("origin"); None where
            it has nothing.
    """

    path: str
    value: Any
    origin: str
    means: str
    comment: str
    enters: tuple[str, ...]
    reruns: tuple[str, ...]
    replaces: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, without the path."""
        return attrs.asdict(self, filter=lambda field, _: field.name != "path")


def explain(recipe: Recipe, key: str, written: Recipe | None = None) -> list[Why]:
    """Returns why the value at a path, or each value below it, is what it is; [] where there is none.

    Args:
        written: the recipe without the options `--set`; None where there is none, or it is none without them.
    """
    found, before = [], flatten(written) if written else {}
    for parts, value in leaves((), as_tables(recipe)):
        path = path_text(parts)
        if path == key or path.startswith((f"{key}.", f"{key}[")):
            origin, direct = recipe.origins[path], enters(recipe, path)
            found.append(
                Why(
                    path=path,
                    value=value,
                    origin=str(origin),
                    means=meaning(recipe, parts),
                    comment=_comment(origin),
                    enters=direct,
                    reruns=_readers(recipe, direct),
                    replaces=_replaced(path, origin, before, written),
                )
            )
    return found


def _replaced(path: str, origin: Origin, before: Mapping[str, Any], written: Recipe | None) -> dict[str, Any] | None:
    if origin.kind != "--set" or written is None or path not in before:
        return None
    return {"value": before[path], "origin": str(written.origins[path])}


def enters(recipe: Recipe, path: str) -> tuple[str, ...]:
    """Returns the stages whose fingerprints have a value among their own inputs."""
    cached = recipe.data.stored
    prefix = max(
        (key for key in _ENTERS if path == key or path.startswith((f"{key}.", f"{key}["))), default="", key=len
    )
    found = _ENTERS[prefix] if prefix else ()
    if path == "verifier.dtype":
        found = (*(("prepare",) if recipe.data.regenerate else ()), *(("capture",) if cached else ()), "train", "bench")
    elif path == "data.hidden_states" and recipe.data.served:
        found = ("capture", "train")
    elif path == "data.states_dtype":
        found = ("capture",) if cached else ("train",)
    elif path.startswith("algorithm.target_layer_ids") and cached:
        found = ("capture", "train")
    return tuple(stage for stage in found if stage in _stages(recipe))


def meaning(recipe: Recipe, parts: Sequence[Part]) -> str:
    """Returns what the docstrings say of the value at a path: its own line, else that of what holds it."""
    owner: Any = Recipe
    told = ""
    for part in parts:
        if isinstance(part, int) or not (isinstance(owner, type) and attrs.has(owner)):
            continue
        if owner is AlgorithmSection and part not in attrs.fields_dict(owner):
            owner = type(recipe.algorithm.config)
        told = _attribute(owner, part) or told
        owner = _inside(owner, part)
    return told


def _attribute(owner: type, name: str) -> str:
    """Returns what the section "Attributes" of a class, or of one it derives from, says of a field."""
    for cls in owner.__mro__:
        doc = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        if found := re.search(rf"^    {re.escape(name)}: (.*(?:\n {{8}}.*)*)", doc, re.MULTILINE):
            return " ".join(found[1].split())
    return ""


def _inside(owner: type, name: str) -> Any:
    """Returns the class of a field's value, or of the values in it; None where it holds no section."""
    hint = typing.get_type_hints(owner).get(name)
    held = (part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and attrs.has(part))
    return next(held, None)


def _comment(origin: Origin) -> str:
    if origin.file is None or origin.line is None:
        return ""
    return comment_at(Path(origin.file).read_text(encoding="utf-8"), origin.line)


def _stages(recipe: Recipe) -> tuple[str, ...]:
    capture = ("capture",) if recipe.data.stored else ()
    return ("verifier", "prepare", *capture, "train", *(("bench",) if recipe.benchmark.suites else ()))


def _readers(recipe: Recipe, direct: Sequence[str]) -> tuple[str, ...]:
    """Returns the stages that read, directly or not, what the given ones write."""
    stages, changed = _stages(recipe), set(direct)
    reads = {**_READS, "train": ("prepare", "capture" if "capture" in stages else "verifier")}
    for stage in stages:
        if changed & set(reads[stage]):
            changed.add(stage)
    return tuple(stage for stage in stages if stage in changed and stage not in direct)
