"""A recipe as git holds it at a revision, with the recipes of its folder and the files that it names."""

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

from speculators.diff.side import Side
from speculators.errors import RecipeError
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Recipe
from speculators.recipe.values import leaves


@attrs.frozen(kw_only=True)
class Unpacked:
    """A recipe unpacked from git, which is there as long as the block of `unpacked`.

    Attributes:
        rev, path: as they were asked for.
        recipe: its file paths are below `held`, of what git has.
        held: the folder that stands for the root of the working tree.
        root: that root.
    """

    rev: str
    path: str
    recipe: Recipe
    held: Path
    root: Path

    def moved(self, side: Side) -> Side:
        """Returns the recipe's side with paths of the working tree, and with notes on what is not of the revision."""

        def move(value: Any, to: str) -> Any:
            return value.replace(str(self.held) + os.sep, to, 1) if isinstance(value, str) else value

        return attrs.evolve(
            side,
            values={key: move(value, f"{self.root}{os.sep}") for key, value in side.values.items()},
            origins={key: move(origin, f"{self.rev}:") for key, origin in side.origins.items()},
            notes=tuple(f"{self.rev}:{self.path}: {words}" for words in self._of_today()),
        )

    def _of_today(self) -> list[str]:
        """Returns which files the recipe reads as they are today: git has none there, or another package has them."""
        recipe, found = self.recipe, []
        for index, source in enumerate(recipe.data.sources):
            if source.is_file and not Path(source.path).is_relative_to(self.held):
                found.append(f"data.sources[{index}] is read as it is today: {source.path}")
        for index, suite in enumerate(recipe.benchmark.suites):
            path = suite.path
            if path is None:
                found.append(f"benchmark.suites[{index}] is read as it is installed today: {suite.name}")
            elif Path(path).is_absolute() and not Path(path).is_relative_to(self.held):
                found.append(f"benchmark.suites[{index}] is read as it is today: {path}")
        return found


@contextmanager
def unpacked(rev: str, path: str) -> Iterator[Unpacked]:
    """Gives a recipe at a git revision; `path` is relative to the working folder.

    Raises:
        RecipeError: git, the revision or the path is not there, or the recipe cannot be used.
    """
    if rev.startswith("-"):
        raise RecipeError(f"{rev!r} is no git revision")
    root = Path(_git(Path.cwd(), "rev-parse", "--show-toplevel").decode().strip())
    target = Path(os.path.relpath(Path.cwd() / path, root))
    listed = _git(root, "ls-tree", "-r", "--name-only", "-z", rev).decode().split("\0")
    if target.as_posix() not in listed:
        raise RecipeError(f"git revision {rev} has no {path}")
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder).resolve()

        def unpack(file: str) -> Path:
            (held / file).parent.mkdir(parents=True, exist_ok=True)
            (held / file).write_bytes(_git(root, "show", f"{rev}:{file}"))
            return held / file

        beside = [file for file in listed if file.endswith(".toml") and Path(file).parent == target.parent]
        for file in beside:
            for named in _named(unpack(file)):
                wanted = os.path.normpath(target.parent / named)
                if wanted in listed and not (held / wanted).exists():
                    unpack(wanted)
        recipe = load_recipe(str(held / target))
        yield Unpacked(rev=rev, path=path, recipe=recipe, held=held, root=root)


def _named(file: Path) -> list[str]:
    """Returns every text of a TOML file: some are paths of files beside it. What is no TOML is told when it is read."""
    try:
        tables = tomli.loads(file.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError):
        return []
    return [value for _, value in leaves((), tables) if isinstance(value, str) and value]


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise RecipeError("git is not installed, and REV:path asks it") from None
    except subprocess.CalledProcessError as error:
        raise RecipeError(f"git {' '.join(arguments)}: {error.stderr.decode(errors='replace').strip()}") from None
