"""Writes the skeleton of an algorithm: config, model, recipe and test, all working."""

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

# The code blocks of the guide's example are the files.
GUIDE = "README.md"
EXAMPLE = "relay"
_BLOCK = re.compile(r"^\*\*`(?P<file>[^`]+)`\*\*\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    name_help = "name of the algorithm and of its package: lower-case letters, digits and _"
    parser.add_argument("name", metavar="NAME", help=name_help)
    into_help = "folder to write to (default: the current one)"
    parser.add_argument("--into", metavar="FOLDER", type=Path, default=Path(), help=into_help)


def run(options: argparse.Namespace) -> int:
    """Writes the files, overwriting none."""
    name = options.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise _refused(f"{name!r} cannot be the name of a package", "use lower-case letters, digits and _")
    if name in CONFIGS.names():
        raise _refused(f"an algorithm {name!r} exists already", "choose another name")
    files = {options.into / file: text for file, text in skeleton(name).items()}
    if existing := [str(path) for path in files if path.exists()]:
        raise _refused(f"these files exist already: {', '.join(existing)}", "nothing was written; use --into FOLDER")
    # A module of that name would be imported instead of the new package: "queue" is in the standard library.
    if (spec := importlib.util.find_spec(name)) is not None:
        place = f" ({spec.origin})" if spec.origin else ""
        message = f"a module {name!r} exists already{place} and would be imported instead of yours"
        raise _refused(message, "choose another name")
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
        # Without "./" a recipe's name would be looked up among the shipped ones.
        command = f"spec run {recipe if recipe.is_absolute() else f'./{recipe}'}"
        print(f"\nTrain and measure it:  {command}\nTest it:               pytest {test}")
        print("Then change the lines marked CHANGE.")
    return 0


def _refused(message: str, hint: str) -> RecipeError:
    """The error about a name or folder that cannot be used; it is raised before anything is written."""
    return RecipeError([Problem("", message, hint)])


def skeleton(name: str) -> dict[str, str]:
    """The files of a new algorithm by path: the code blocks of the guide, under another name."""
    guide = resources.files("speculators.models").joinpath(GUIDE).read_text(encoding="utf-8")
    title = "".join(part.capitalize() for part in name.split("_"))

    def renamed(text: str) -> str:
        return text.replace(EXAMPLE, name).replace(EXAMPLE.capitalize(), title)

    return {renamed(block["file"]): renamed(block["text"]) for block in _BLOCK.finditer(guide)}
