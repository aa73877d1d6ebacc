"""Finds the data of a lock again by its content, wherever it lies now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import DataError
from speculators.recipe.catalog import recipes_folder, resolved_suite, suites_folder
from speculators.recipe.fingerprint import file_hashes, source_identity
from speculators.recipe.input_sections import DataSource
from speculators.recipe.lock import Lock
from speculators.recipe.schema import Recipe
from speculators.recipe.source_files import is_pattern


@attrs.frozen(kw_only=True)
class MissingFile:
    """A file, or files of a folder, whose content of the lock was not found anywhere.

    Attributes:
        stage: the stage that reads the file.
        key: TOML path of the file in the recipe.
        locked: sha256 in the lock, by name within a folder; "" names a path's only file.
        current: the same of what has its name now; None if nothing has.
    """

    stage: str
    key: str
    file: str
    locked: Mapping[str, str]
    current: Mapping[str, str] | None

    @property
    def recorded(self) -> str | Mapping[str, str]:
        """The locked sha256, alone for one file."""
        return self.locked.get("", self.locked)

    @property
    def again(self) -> str | Mapping[str, str] | None:
        """The current sha256, alone for one file."""
        return None if self.current is None else self.current.get("", self.current)

    def __str__(self) -> str:
        if self.current is None:
            return f"{self.key} = {self.file}: it is missing; the lock has {_described('', self.locked)}"
        differing = [name for name in sorted({*self.locked, *self.current}) if self._differs(name)]
        now = ", ".join(_described(name, self.current) for name in differing)
        then = ", ".join(_described(name, self.locked) for name in differing)
        return f"{self.key} = {self.file}: its content has changed: {now}; the lock has {then}"

    def _differs(self, name: str) -> bool:
        return self.current is None or self.locked.get(name) != self.current.get(name)


def _described(name: str, content: Mapping[str, str]) -> str:
    if name not in content:
        return f"no {name}" if name else f"{len(content)} files"
    return f"{name} with sha256 {content[name]}" if name else f"sha256 {content[name]}"


def relocate(recipe: Recipe, lock: Lock, run: Path) -> tuple[Recipe, list[MissingFile]]:
    """Points a locked recipe to files with the locked content.

    Looks at the recipe's paths, in the run folder and its parent, in the working folder and among the shipped files.

    Returns:
        The recipe, and the files whose content is nowhere.
    """
    folders = (run, run.parent, Path.cwd(), recipes_folder() / "data", recipes_folder(), suites_folder())
    missing: list[MissingFile] = []

    def find(stage: str, key: str, source: DataSource, identity: Mapping[str, Any]) -> str:
        if not source.is_local or not (locked := file_hashes(identity)):
            return source.path  # data of a hub is identified by its revision
        path = Path(source.path)
        places = [path, *(folder / _tail(path) for folder in folders)]
        contents = {str(place): content for place in places if (content := _content(source, place)) is not None}
        for place, content in contents.items():
            if content == locked:
                return str(Path(place).resolve())
        current = next(iter(contents.values()), None)
        missing.append(MissingFile(stage=stage, key=key, file=source.path, locked=locked, current=current))
        return source.path

    verifier = recipe.verifier
    if verifier.chat_template is not None and (digest := lock.inputs["verifier"].get("chat_template")) is not None:
        template = DataSource(path=verifier.chat_template)
        file = find("verifier", "verifier.chat_template", template, {"sha256": digest})
        verifier = attrs.evolve(verifier, chat_template=file)
    inputs = lock.inputs["prepare"]
    sources = tuple(
        attrs.evolve(source, path=find("prepare", f"data.sources[{index}].path", source, identity))
        for index, (source, identity) in enumerate(_pairs(recipe.data.sources, inputs["sources"]))
    )
    suites = []
    for index, (suite, identity) in enumerate(_pairs(recipe.benchmark.suites, inputs["held_out"])):
        whole = resolved_suite(suite)
        source = attrs.evolve(whole.source, take=None)
        path = find("prepare", f"benchmark.suites[{index}].path", source, identity)
        # While the catalogue has the same content, a suite stays a bare name.
        suites.append(suite if path == str(whole.path) else attrs.evolve(whole, path=path))
    return (
        attrs.evolve(
            recipe,
            verifier=verifier,
            data=attrs.evolve(recipe.data, sources=sources),
            benchmark=attrs.evolve(recipe.benchmark, suites=tuple(suites)),
        ),
        missing,
    )


def _pairs(values: Sequence[Any], identities: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Mapping[str, Any]]]:
    """Pairs each value with its locked identity; values that a changed recipe adds have an empty one."""
    return [(value, identities[index] if index < len(identities) else {}) for index, value in enumerate(values)]


def _tail(path: Path) -> Path:
    """The last part of a path, and of a pattern everything from the folder on that holds its files."""
    parts = path.parts
    first = next((index for index, part in enumerate(parts) if is_pattern(part)), len(parts))
    return Path(*parts[max(first - 1, 1) :]) if first < len(parts) else Path(path.name)


def _content(source: DataSource, place: Path) -> Mapping[str, str] | None:
    """Hashes the files of a source at another place; None if there are none."""
    try:
        return file_hashes(source_identity(attrs.evolve(source, path=str(place))))
    except DataError:
        return None
