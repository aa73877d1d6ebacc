"""Makes a run again from its lock, in folders of its own, and verifies it stage by stage, naming what differs first."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from speculators.errors import LockError
from speculators.recipe.lock import Lock
from speculators.runs.places import find_run

from .common import RUN_HELP, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("folder", metavar="RUN", help=RUN_HELP)
    text = "where to keep the re-run, which resumes there after Ctrl-C (default: RUN-reproduced, beside RUN)"
    parser.add_argument("--to", metavar="FOLDER", type=Path, help=text)
    text = "the last stage to run and compare, for a quick check (default: all)"
    parser.add_argument("--until", metavar="STAGE", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints the findings; exits with 0 if the run is reproduced, 1 if something differs or could not be compared."""
    # Before torch is imported, so that a folder that is not a run is reported at once.
    folder = find_run(options.folder).path.resolve()
    lock = Lock.read(folder)
    lock.resolved(folder)
    to = (options.to or folder.with_name(f"{folder.name}-reproduced")).resolve()
    if to == folder or to in folder.parents or folder in to.parents:
        raise LockError(f"{to}: the re-run of {folder} must be kept apart from it", hint="give another folder (--to)")
    until = options.until or list(lock.fingerprints)[-1]
    if until not in lock.fingerprints:
        raise LockError(
            f"--until {until}: the run has no such stage", hint=f"available: {', '.join(lock.fingerprints)}"
        )
    if lock.environment.world_size > 1 and "RANK" not in os.environ:
        options.folder = folder
        return _launch(options, lock.environment.world_size)
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.report.reproduce import reproduction_tables
    from speculators.reproduce.rerun import reproduce
    from speculators.training.world import start, stop

    world = start()
    try:
        with RunView(quiet=options.quiet) as progress:
            result = reproduce(folder, lock, to=to, until=until, world=world, listen=progress)
    finally:
        stop(world)
    if not world.is_main:
        return 0
    if options.json:
        print_json(result.to_json())
    else:
        console().print(reproduction_tables(result))
    return 0 if result.verdict == "reproduced" else 1


def _launch(options: argparse.Namespace, nproc: int) -> int:
    from speculators.training.launch import launch

    arguments = ["-m", "speculators.cli", "reproduce", str(options.folder)]
    arguments += ["--to", str(options.to)] if options.to else []
    arguments += ["--until", options.until] if options.until else []
    arguments += [flag for flag, used in (("--json", options.json), ("--quiet", options.quiet)) if used]
    return launch(arguments, nproc=nproc)
