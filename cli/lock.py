"""Checks that locks still resolve: those of the shipped recipes, or of runs. For CI."""

from __future__ import annotations

import argparse
from pathlib import Path

import attrs

from speculators.errors import Problem, RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.load import load_recipe
from speculators.recipe.lock import Lock
from speculators.recipe.lock_check import (
    LockCheck,
    check_run,
    check_shipped,
    lock_of_recipe,
    write_locks,
)
from speculators.recipe.shipped import read_locks
from speculators.registry import near_miss
from speculators.runs.places import find_run

from .common import add_verifier_config, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = "names of shipped recipes, or runs (default: all shipped recipes)"
    parser.add_argument("names", metavar="WHAT", nargs="*", help=text)
    action = parser.add_mutually_exclusive_group(required=True)
    text = "report what no longer resolves, and exit with 1 if anything does not"
    action.add_argument("--check", action="store_true", help=text)
    text = "write new locks for shipped recipes, after an intended change of their meaning"
    action.add_argument("--write", action="store_true", help=text)
    add_verifier_config(parser)


def run(options: argparse.Namespace) -> int:
    """Checks or writes; returns 1 if a lock does not resolve."""
    names = options.names or recipe_names()
    return _write(names, options) if options.write else _check(names, options)


def _check(names: list[str], options: argparse.Namespace) -> int:
    locks = read_locks()
    checks = [_check_one(name, locks) for name in names]
    if options.json:
        print_json([attrs.asdict(check) for check in checks])
    else:
        for check in checks:
            if check.problems or not options.quiet:
                print(f"{check.name}: {'does not resolve' if check.problems else 'resolves'}")
            for problem in check.problems:
                print(f"  {problem}")
            for note in check.notes if not options.quiet else ():
                print(f"  note: {note}")
    return 1 if any(check.problems for check in checks) else 0


def _check_one(name: str, locks: dict[str, object]) -> LockCheck:
    if name in recipe_names():
        return check_shipped(name, locks)
    try:
        folder = find_run(name).path
    except RecipeError:
        if (hint := near_miss(name, recipe_names())) is None:
            raise
        raise RecipeError([Problem("", f"{name}: neither a shipped recipe nor a run", hint)]) from None
    return _with_verifier(check_run(folder), folder)


def _with_verifier(check: LockCheck, folder: Path) -> LockCheck:
    """Compares the verifier's files with their hashes if they are on this machine; downloads nothing."""
    from speculators.verifier.sources import existing_folder, verifier_files

    lock = Lock.read(folder)
    model = existing_folder(lock.resolved(folder).verifier)
    if model is None:
        return attrs.evolve(check, notes=(*check.notes, "the verifier is not on this machine, so it was not checked"))
    current, locked = verifier_files(model), lock.verifier.files
    problems = [
        f"verifier: {model / name} is {current.get(name)}, but {locked.get(name)} in the lock"
        for name in dict.fromkeys([*locked, *current])
        if current.get(name) != locked.get(name)
    ]
    return attrs.evolve(check, problems=(*check.problems, *problems))


def _write(names: list[str], options: argparse.Namespace) -> int:
    if unknown := [name for name in names if name not in recipe_names()]:
        raise RecipeError(f"{', '.join(unknown)}: not a shipped recipe; spec run writes the lock of a run")
    locks = read_locks()
    config = VerifierFacts.read(options.verifier_config) if options.verifier_config else None
    for name in names:
        model = load_recipe(name).verifier.model
        if config or model not in locks["verifiers"]:
            locks["verifiers"][model] = (config or _fetch(name)).to_dict()
        locks["recipes"][name] = lock_of_recipe(name, VerifierFacts(locks["verifiers"][model]))
    file = write_locks(locks)
    if options.json:
        print_json({"file": str(file), "recipes": names})
    elif not options.quiet:
        print(f"{file}: wrote the locks of {len(names)} recipes")
    return 0


def _fetch(name: str) -> VerifierFacts:
    from speculators.verifier.sources import fetch_facts

    return fetch_facts(load_recipe(name).verifier)
