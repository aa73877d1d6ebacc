"""Tells what two recipes or runs differ in by meaning, what that invalidates, and whether their results compare."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import attrs

from speculators.config import VerifierFacts
from speculators.errors import ArtifactError, RecipeError
from speculators.recipe.diff import Side, as_values, exit_code, to_markdown
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe

from .common import add_verifier_config, print_json

_REVISION = re.compile(r"(?P<rev>[^:]+):(?P<path>[^:]+\.toml)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = "a recipe's name or file, a file at a git revision (REV:path.toml), or a run folder"
    parser.add_argument("a", metavar="A", help=text)
    parser.add_argument("b", metavar="B", help="likewise")
    add_verifier_config(parser)
    parser.add_argument("--md", action="store_true", help="print Markdown, for a pull request")


def run(options: argparse.Namespace) -> int:
    """Prints the comparison; 0 if nothing differs, 1 if something does."""
    facts = VerifierFacts.read(options.verifier_config) if options.verifier_config else None
    a, b = (_side(name, facts) for name in (options.a, options.b))
    result = as_values(a, b)
    if a.run and b.run:
        from speculators.pipeline.records import results

        result |= results(a.run, b.run)
    if options.json:
        print_json(result)
    elif options.md:
        print(to_markdown(result), end="")
    elif not options.quiet:
        from speculators.report.console import console
        from speculators.report.diff import diff_tables

        console().print(diff_tables(result))
    return exit_code(result)


def _side(name: str, facts: VerifierFacts | None) -> Side:
    if (Path(name) / "plan.json").is_file():
        return Side.of_run(name, Path(name))
    if Path(name).is_dir():
        raise ArtifactError(f"{name}: no run: there is no plan.json", hint="spec ls lists the runs")
    found = _REVISION.fullmatch(name)
    recipe = _at_revision(found["rev"], found["path"]) if found and not Path(name).exists() else load_recipe(name)
    known = facts or _held_facts(recipe)
    return Side.of_recipe(name, recipe, make_plan(recipe, known) if known else None)


def _held_facts(recipe: Recipe) -> VerifierFacts | None:
    """Returns the verifier's config.json if it is on this machine: nothing is fetched to compare two files."""
    from speculators.verifier.sources import held_folder

    folder = held_folder(recipe.verifier)
    return VerifierFacts.read(folder / "config.json") if folder else None


def _at_revision(rev: str, path: str) -> Recipe:
    """Loads a recipe as git holds it, with the other recipes of its folder, which it may extend."""
    if rev.startswith("-"):
        raise RecipeError(f"{rev!r} is no git revision")
    folder = Path(path).parent
    listed = _git("ls-tree", "--name-only", rev, f"{folder.as_posix()}/").splitlines()
    with tempfile.TemporaryDirectory() as held:
        for file in (file for file in listed if file.endswith(".toml")):
            (Path(held) / Path(file).name).write_text(_git("show", f"{rev}:./{file}"), encoding="utf-8")
        target = Path(held) / Path(path).name
        if not target.is_file():
            raise RecipeError(f"git revision {rev} has no {path}")
        recipe = load_recipe(str(target))
        return _moved(recipe, str(Path(held).resolve()), str(folder.resolve()), f"{rev}:{folder.as_posix()}")


def _moved(recipe: Recipe, held: str, folder: str, told: str) -> Recipe:
    """Returns the recipe with the paths of where it was unpacked replaced by those of where it belongs."""

    def path(value: str | None) -> str | None:
        return value.replace(held, folder, 1) if value and value.startswith(held) else value

    sources = tuple(attrs.evolve(source, path=path(source.path)) for source in recipe.data.sources)
    suites = tuple(attrs.evolve(suite, path=path(suite.path)) for suite in recipe.benchmark.suites)
    origins = {
        key: attrs.evolve(origin, file=origin.file.replace(held, told, 1)) if origin.file else origin
        for key, origin in recipe.origins.items()
    }
    return attrs.evolve(
        recipe,
        verifier=attrs.evolve(recipe.verifier, model=path(recipe.verifier.model)),
        data=attrs.evolve(recipe.data, sources=sources),
        benchmark=attrs.evolve(recipe.benchmark, suites=suites),
        origins=origins,
    )


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise RecipeError("git is not installed, and REV:path asks it") from None
    except subprocess.CalledProcessError as error:
        raise RecipeError(f"git {' '.join(arguments)}: {error.stderr.strip()}") from None
    return done.stdout
