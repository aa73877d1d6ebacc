"""Reads a recipe at a git revision, together with the recipes of its folder and the files that it names."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import tomli

from speculators.diff.side import DiffSide
from speculators.errors import RecipeError
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Recipe
from speculators.recipe.values import leaves


@attrs.frozen(kw_only=True)
class RecipeAtRevision:
    """A recipe unpacked from git into a temporary folder, which exists only inside the block of `unpacked`.

    Attributes:
        rev, path: as the user typed them.
        recipe: its file paths lie below `copy`, as far as git has the files.
        copy: the temporary folder that stands for the root of the working tree.
        root: that root.
    """

    rev: str
    path: str
    recipe: Recipe
    copy: Path
    root: Path

    def relocated(self, side: DiffSide) -> DiffSide:
        """Rewrites temporary paths of a side to those of the working tree, and notes files of another date."""

        def move(value: Any, to: str) -> Any:
            return value.replace(str(self.copy) + os.sep, to, 1) if isinstance(value, str) else value

        return attrs.evolve(
            side,
            values={key: move(value, f"{self.root}{os.sep}") for key, value in side.values.items()},
            origins={key: move(origin, f"{self.rev}:") for key, origin in side.origins.items()},
            notes=tuple(f"{self.rev}:{self.path}: {note}" for note in self._notes()),
        )

    def _notes(self) -> list[str]:
        """Names the files that are read as they are today: git has none of them, or another package ships them."""
        notes = []
        for index, source in enumerate(self.recipe.data.sources):
            if source.is_local and not Path(source.path).is_relative_to(self.copy):
                notes.append(f"data.sources[{index}] is read as it is today: {source.path}")
        for index, suite in enumerate(self.recipe.benchmark.suites):
            path = suite.path
            if path is None:
                notes.append(f"benchmark.suites[{index}] is read as it is installed today: {suite.name}")
            elif Path(path).is_absolute() and not Path(path).is_relative_to(self.copy):
                notes.append(f"benchmark.suites[{index}] is read as it is today: {path}")
        return notes


@contextmanager
def unpacked(rev: str, path: str) -> Iterator[RecipeAtRevision]:
    """Unpacks a recipe at a git revision while the block runs.

    Args:
        rev: anything that git understands as a revision.
        path: relative to the working folder.

    Raises:
        RecipeError: git is not installed, the revision or the path does not exist, or the recipe is wrong.
    """
    if rev.startswith("-"):
        raise RecipeError(f"{rev!r} is not a git revision")
    root = Path(_git(Path.cwd(), "rev-parse", "--show-toplevel").decode().strip())
    target = Path(os.path.relpath(Path.cwd() / path, root))
    tracked = _git(root, "ls-tree", "-r", "--name-only", "-z", rev).decode().split("\0")
    if target.as_posix() not in tracked:
        raise RecipeError(f"git revision {rev} has no {path}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()

        def unpack(file: str) -> Path:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes(_git(root, "show", f"{rev}:{file}"))
            return copy / file

        # Recipes beside it may be extended by it; a data file is unpacked only where a recipe names it.
        for file in tracked:
            if file.endswith(".toml") and Path(file).parent == target.parent:
                for text in _texts(unpack(file)):
                    referenced = os.path.normpath(target.parent / text)
                    if referenced in tracked and not (copy / referenced).exists():
                        unpack(referenced)
        recipe = load_recipe(str(copy / target))
        yield RecipeAtRevision(rev=rev, path=path, recipe=recipe, copy=copy, root=root)


def _texts(file: Path) -> list[str]:
    """Lists every text of a TOML file, some of which are paths; a file that is not TOML is reported when it is read."""
    try:
        tables = tomli.loads(file.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError):
        return []
    return [value for _, value in leaves((), tables) if isinstance(value, str) and value]


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise RecipeError("git is not installed; REV:path needs it") from None
    except subprocess.CalledProcessError as error:
        raise RecipeError(f"git {' '.join(arguments)}: {error.stderr.decode(errors='replace').strip()}") from None
