"""Writes the skeleton of an algorithm: config, model, recipe and test, which run as they are."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path

from speculators.config import CONFIGS
from speculators.errors import Problem, RecipeError, SpeculatorsError

from .common import print_json

# The guide's example; its code blocks are the files.
GUIDE = "README.md"
EXAMPLE = "relay"
_BLOCK = re.compile(r"^\*\*`(?P<file>[^`]+)`\*\*\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("name", metavar="NAME", help="of the algorithm and its package: small letters, digits, _")
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=Path(), help="where to write (here)")


def run(options: argparse.Namespace) -> int:
    """Writes the files; none is overwritten."""
    name = options.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise _refused(f"{name!r} is no name for a package", "small letters, digits and _, like my_algorithm")
    if name in CONFIGS.names():
        raise _refused(f"there is an algorithm {name!r} already", "take another name")
    files = {options.into / file: text for file, text in skeleton(name).items()}
    if held := [str(path) for path in files if path.exists()]:
        raise _refused(f"{', '.join(held)}: there already", "nothing was written; --into another folder")
    if (found := importlib.util.find_spec(name)) is not None:
        where = f" ({found.origin})" if found.origin else ""
        message = f"there is a module {name!r} already{where}: it would be imported instead of yours"
        raise _refused(message, "take another name")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpeculatorsError(f"{error.filename} cannot be written: {error.strerror}") from None
    recipe = next(path for path in files if path.suffix == ".toml")
    test = next(path for path in files if path.name.startswith("test_"))
    if options.json:
        print_json({"files": [str(path) for path in files], "recipe": str(recipe), "test": str(test)})
    elif not options.quiet:
        print("\n".join(str(path) for path in files))
        told = recipe if recipe.is_absolute() else f"./{recipe}"
        print(f"\nspec run {told} trains and measures it; pytest {test} tests it; CHANGE marks what to change")
    return 0


def _refused(message: str, hint: str) -> RecipeError:
    """Returns the error of a usage that cannot be: nothing was written."""
    return RecipeError([Problem("", message, hint)])


def skeleton(name: str) -> dict[str, str]:
    """Returns the text of each file of a new algorithm by its path: the guide's blocks under another name."""
    guide = resources.files("speculators.models").joinpath(GUIDE).read_text(encoding="utf-8")
    title = "".join(part.capitalize() for part in name.split("_"))

    def named(text: str) -> str:
        return text.replace(EXAMPLE, name).replace(EXAMPLE.capitalize(), title)

    return {named(found["file"]): named(found["text"]) for found in _BLOCK.finditer(guide)}
