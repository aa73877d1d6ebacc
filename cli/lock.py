"""Checks that locks still resolve (--check), those of the recipes that come with the package or of runs; for CI."""

from __future__ import annotations

import argparse
from pathlib import Path

import attrs

from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.load import load_recipe
from speculators.recipe.lock import Lock
from speculators.recipe.lock_check import LockCheck, check_run, check_shipped, lock_of_recipe, read_locks, write_locks
from speculators.registry import near_miss

from .common import add_verifier_config, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = "a recipe of the package by name, or a run folder (all recipes of the package)"
    parser.add_argument("names", metavar="WHAT", nargs="*", help=text)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--check", action="store_true", help="tell what does not resolve any more; 1 if something does not"
    )
    what.add_argument("--write", action="store_true", help="lock recipes of the package anew, after a wanted change")
    add_verifier_config(parser)


def run(options: argparse.Namespace) -> int:
    """Checks or writes; 0 if all resolves, 1 if not."""
    names = options.names or recipe_names()
    return _write(names, options) if options.write else _check(names, options)


def _check(names: list[str], options: argparse.Namespace) -> int:
    held = read_locks()
    found = [_check_one(name, held) for name in names]
    if options.json:
        print_json([attrs.asdict(each) for each in found])
    else:
        for each in found:
            if each.problems or not options.quiet:
                print(f"{each.name}: {'does not resolve' if each.problems else 'resolves'}")
            for problem in each.problems:
                print(f"  {problem}")
            for note in each.notes if not options.quiet else ():
                print(f"  note: {note}")
    return 1 if any(each.problems for each in found) else 0


def _check_one(name: str, held: dict[str, object]) -> LockCheck:
    if name in recipe_names():
        return check_shipped(name, held)
    if not Path(name).is_dir():
        hint = near_miss(name, recipe_names()) or "spec ls lists both"
        raise RecipeError(f"{name}: neither a recipe of the package nor a run folder ({hint})")
    return _with_verifier(check_run(Path(name)), Path(name))


def _with_verifier(told: LockCheck, folder: Path) -> LockCheck:
    """Adds whether the verifier's files have their hashes, if it is on this machine: nothing is fetched to check."""
    from speculators.verifier.sources import existing_folder, verifier_files

    lock = Lock.read(folder)
    there = existing_folder(lock.resolved(folder).verifier)
    if there is None:
        return attrs.evolve(told, notes=(*told.notes, "the verifier is not on this machine: not checked"))
    files, wanted = verifier_files(there), lock.verifier.files
    wrong = [name for name in dict.fromkeys([*wanted, *files]) if files.get(name) != wanted.get(name)]
    problems = [f"verifier: {there / name} is {files.get(name)}, in the lock {wanted.get(name)}" for name in wrong]
    return attrs.evolve(told, problems=(*told.problems, *problems))


def _write(names: list[str], options: argparse.Namespace) -> int:
    if unknown := [name for name in names if name not in recipe_names()]:
        raise RecipeError(f"{', '.join(unknown)}: no recipe of the package; a run has its lock from spec run")
    held = read_locks()
    given = VerifierFacts.read(options.verifier_config) if options.verifier_config else None
    for name in names:
        model = load_recipe(name).verifier.model
        if given or model not in held["verifiers"]:
            held["verifiers"][model] = (given or _fetch(name)).to_dict()
        held["recipes"][name] = lock_of_recipe(name, VerifierFacts(held["verifiers"][model]))
    file = write_locks(held)
    if options.json:
        print_json({"file": str(file), "recipes": names})
    elif not options.quiet:
        print(f"{file}: {len(names)} recipes lock_of_recipe")
    return 0


def _fetch(name: str) -> VerifierFacts:
    from speculators.verifier.sources import fetch_facts

    return fetch_facts(load_recipe(name).verifier)
