"""Makes a run again from its lock, in folders of its own, and verifies it stage by stage: names what differs first."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from speculators.errors import LockError
from speculators.recipe.lock import Lock

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    text = "where the re-run is kept, and gone on with after Ctrl-C (beside RUN, RUN-reproduced)"
    parser.add_argument("--to", metavar="FOLDER", type=Path, help=text)
    text = "the last stage that is made and compared, for a cheap check (all)"
    parser.add_argument("--until", metavar="STAGE", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints what the re-run showed; 0 if the run is reproduced, 1 if something differs or could not be compared."""
    # Before torch is imported: a folder that is no run is told at once.
    lock = Lock.read(options.folder)
    lock.resolved(options.folder)
    folder = options.folder.resolve()
    to = (options.to or folder.with_name(f"{folder.name}-reproduced")).resolve()
    if to == folder or to in folder.parents or folder in to.parents:
        raise LockError(f"{to}: the re-run of {folder} must be kept apart from it", hint="give another folder (--to)")
    until = options.until or list(lock.fingerprints)[-1]
    if until not in lock.fingerprints:
        raise LockError(
            f"--until {until}: the run has no such stage", hint=f"there are: {', '.join(lock.fingerprints)}"
        )
    if lock.environment.world_size > 1 and "RANK" not in os.environ:
        return _launch(options, lock.environment.world_size)
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.report.reproduce import reproduction_tables
    from speculators.reproduce.again import reproduce
    from speculators.training.world import start, stop

    world = start()
    try:
        with RunView(quiet=options.quiet) as view:
            found = reproduce(folder, lock, to=to, until=until, world=world, listen=view)
    finally:
        stop(world)
    if not world.is_main:
        return 0
    result = found.to_json()
    if options.json:
        print_json(result)
    else:
        console().print(reproduction_tables(result))
    return 0 if result["reproduced"] else 1


def _launch(options: argparse.Namespace, nproc: int) -> int:
    from speculators.training.launch import launch

    arguments = ["-m", "speculators.cli", "reproduce", str(options.folder)]
    arguments += ["--to", str(options.to)] if options.to else []
    arguments += ["--until", options.until] if options.until else []
    arguments += [flag for flag, given in (("--json", options.json), ("--quiet", options.quiet)) if given]
    return launch(arguments, nproc=nproc)
