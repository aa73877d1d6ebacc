"""Files that a lock names by hash, found again: where they were, beside the run, here, or among those shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.files.whole import file_sha256
from speculators.recipe.catalog import recipes_folder, resolved_suite, suites_folder
from speculators.recipe.lock import Lock
from speculators.recipe.schema import Recipe
from speculators.recipe.sources import is_file_path

Stages = Mapping[str, Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Lost:
    """A file that is nowhere with the content that the lock has.

    Attributes:
        stage: that reads it.
        key: its path in the recipe.
        locked: sha256.
        found: sha256 of what is there under its name now; None where there is nothing.
    """

    stage: str
    key: str
    file: str
    locked: str
    found: str | None

    def __str__(self) -> str:
        there = "it is not there" if self.found is None else f"its sha256 is {self.found}"
        return f"{self.key} = {self.file}: {there}, that of the lock is {self.locked}"


def relocate(recipe: Recipe, lock: Lock, run: Path) -> tuple[Recipe, list[Lost]]:
    """Returns the recipe with each file where its content is, and the files whose content is nowhere."""
    folders = (run, run.parent, Path.cwd(), recipes_folder() / "data", recipes_folder(), suites_folder())
    lost: list[Lost] = []

    def find(stage: str, key: str, path: str, identity: Mapping[str, Any]) -> str:
        digest = identity.get("sha256")
        if digest is None or not is_file_path(path):
            return path  # of a hub: its revision is what identifies it
        places = [Path(path), *(folder / Path(path).name for folder in folders)]
        digests = {place: file_sha256(place) for place in places if place.is_file()}
        for place, found in digests.items():
            if found == digest:
                return str(place.resolve())
        there = next(iter(digests.values()), None)
        lost.append(Lost(stage=stage, key=key, file=path, locked=digest, found=there))
        return path

    inputs = lock.inputs["prepare"]
    sources = tuple(
        attrs.evolve(source, path=find("prepare", f"data.sources[{index}].path", source.path, identity))
        for index, (source, identity) in enumerate(_pairs(recipe.data.sources, inputs["sources"]))
    )
    suites = []
    for index, (suite, identity) in enumerate(_pairs(recipe.benchmark.suites, inputs["held_out"])):
        whole = resolved_suite(suite)
        path = find("prepare", f"benchmark.suites[{index}].path", str(whole.path), identity)
        # A suite of the catalogue keeps its name alone while the catalogue has its content.
        suites.append(suite if path == str(whole.path) else attrs.evolve(whole, path=path))
    return (
        attrs.evolve(
            recipe,
            data=attrs.evolve(recipe.data, sources=sources),
            benchmark=attrs.evolve(recipe.benchmark, suites=tuple(suites)),
        ),
        lost,
    )


def _pairs(values: Sequence[Any], identities: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Mapping[str, Any]]]:
    """Returns each value with its identity; one that a changed recipe has more of has none."""
    return [(value, identities[index] if index < len(identities) else {}) for index, value in enumerate(values)]


def differing_inputs(locked: Stages, here: Stages, stage: str) -> list[tuple[str, Any, Any]]:
    """Returns (path, of the lock, here) of what differs in a stage's own inputs; those of earlier stages are theirs.

    Args:
        locked, here: inputs of each stage, as JSON values.
    """
    if stage not in locked or stage not in here:
        before, after = ("there" if stage in side else None for side in (locked, here))
        return [(f"the stage {stage}", before, after)]
    one, other = ({key: value for key, value in side[stage].items() if key not in side} for side in (locked, here))
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
