"""Checks that locks still resolve: those of the shipped recipes, and of runs, whose files are found again by hash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError, LockError, RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipes_folder
from speculators.recipe.checks import check_recipe
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.load import load_recipe
from speculators.recipe.lock import Lock
from speculators.recipe.plan import make_plan
from speculators.recipe.relocate import relocate
from speculators.recipe.schema import Recipe
from speculators.recipe.shipped import NAME, identifies


@attrs.frozen(kw_only=True)
class LockCheck:
    """The outcome of checking one lock.

    Attributes:
        name: the recipe, or the run folder.
        problems: why the lock does not resolve; none if it does.
        notes: what could not be checked, or has no pinned version.
    """

    name: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def facts_of_run(folder: Path, section: VerifierSection) -> VerifierFacts | None:
    """Looks up a verifier's config.json in a run's lock; None if the lock has another verifier or cannot be read."""
    try:
        lock = Lock.read(folder)
    except LockError:
        return None
    same = identifies(section, lock.inputs["verifier"])
    return VerifierFacts(lock.verifier.config, str(folder / "lock.json")) if same else None


# Two config.json that differ here belong to different models, however old either file is.
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def contradictions(facts: VerifierFacts, known: VerifierFacts) -> list[str]:
    """Describes where a given config.json contradicts the known one of the verifier."""
    shared = [key for key in _ARCHITECTURE if key in facts and key in known and facts[key] != known[key]]
    return [f"{key} {facts[key]}, not {known[key]}" for key in shared]


def write_locks(locks: Mapping[str, Any]) -> Path:
    """Writes the locks of the shipped recipes beside them, in a checkout."""
    file = recipes_folder() / NAME
    ordered = {key: locks[key] if key == "format" else dict(sorted(locks[key].items())) for key in locks}
    try:
        file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be written: {error.strerror}") from error
    return file


def lock_of_recipe(name: str, facts: VerifierFacts) -> dict[str, Any]:
    """Makes the lock of a recipe of the catalogue."""
    plan = make_plan(load_recipe(name), facts)
    return {"version": plan.recipe.version, "fingerprints": plan.fingerprints(), "inputs": plan.inputs()}


def check_shipped(name: str, locks: Mapping[str, Any]) -> LockCheck:
    """Checks, offline, that a recipe of the catalogue still means what its lock says."""
    recipe = load_recipe(name)
    mend = f"spec lock --write {name}"
    if name not in locks["recipes"]:
        return LockCheck(name=name, problems=(f"has no lock ({mend} makes one)",))
    if recipe.verifier.model not in locks["verifiers"]:
        return LockCheck(name=name, problems=(f"the lock has no config.json of {recipe.verifier.model} ({mend})",))
    lock, facts = locks["recipes"][name], VerifierFacts(locks["verifiers"][recipe.verifier.model])
    problems = _compared(recipe, facts, lock["inputs"], lock["fingerprints"])
    if problems and recipe.version == lock["version"]:
        problems += (f"its meaning changed but its version {recipe.version} did not: raise the version, then {mend}",)
    return LockCheck(name=name, problems=problems, notes=_unpinned(recipe))


def check_run(folder: Path) -> LockCheck:
    """Checks that everything a run's lock names is still available, except the verifier's files."""
    lock = Lock.read(folder)
    recipe, missing = relocate(lock.resolved(folder), lock, folder)
    if missing:
        return LockCheck(name=str(folder), problems=tuple(str(each) for each in missing))
    facts = VerifierFacts(lock.verifier.config)
    problems = _compared(recipe, facts, lock.inputs, lock.fingerprints)
    return LockCheck(name=str(folder), problems=problems, notes=_unpinned(recipe))


def _compared(
    recipe: Recipe, facts: VerifierFacts, inputs: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> tuple[str, ...]:
    if problems := check_recipe(recipe):
        return tuple(str(problem) for problem in problems)
    try:
        plan = make_plan(recipe, facts)
    except RecipeError as error:
        return tuple(str(problem) for problem in error.problems)
    current = plan.inputs()
    differing = [
        f"{stage}: {path} is {before!r} in the lock but {after!r} now"
        for stage in dict.fromkeys([*inputs, *current])
        for path, before, after in differing_inputs(inputs, current, stage)
    ]
    if not differing and dict(fingerprints) != plan.fingerprints():
        differing = ["the inputs are the same but the fingerprints are not: the lock was edited"]
    return tuple(differing)


def _unpinned(recipe: Recipe) -> tuple[str, ...]:
    """Lists what a hub may replace with something else under the same name."""
    named = [("verifier", recipe.verifier.model, recipe.verifier.revision)] if recipe.verifier.kind == "hub" else []
    named += [("data", source.path, source.revision) for source in recipe.data.sources if not source.is_local]
    return tuple(f"{kind} {name} has no revision: its content may change" for kind, name, rev in named if rev is None)


Stages = Mapping[str, Mapping[str, Any]]


def differing_inputs(locked: Stages, current: Stages, stage: str) -> list[tuple[str, Any, Any]]:
    """Compares a stage's own inputs; differences of earlier stages are reported for those.

    Args:
        locked, current: inputs of each stage, as JSON values.

    Returns:
        Path, locked value and current value of each difference.
    """
    if stage not in locked or stage not in current:
        before, after = ("present" if stage in side else None for side in (locked, current))
        return [(f"the stage {stage}", before, after)]
    one, other = ({key: value for key, value in side[stage].items() if key not in side} for side in (locked, current))
    return list(_differences("", one, other))


def _differences(path: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from _differences(f"{path}.{key}" if path else key, one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{index}]", *pair)
    elif one != other:
        yield path, one, other
