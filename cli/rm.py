"""Removes runs, after a question. A run that is at work is refused, and the cache stays as it is."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from speculators.errors import ArtifactError, Problem, RecipeError
from speculators.files.disk import disk_errors, folder_bytes, size_text
from speculators.files.locks import is_locked, locked_or_refused
from speculators.runs.places import RunFolder, find_run
from speculators.runs.summary import summary

from .common import RUN_HELP, add_runs, add_yes, agreed, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("names", metavar="RUN", nargs="+", help=f"{RUN_HELP}; or a re-run of spec reproduce")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    add_yes(parser)
    add_runs(parser)


def run(options: argparse.Namespace) -> int:
    """Removes the runs."""
    folders = list(dict.fromkeys(_folder(name, options.runs) for name in options.names))
    for folder in folders:
        _refuse_unsafe(folder)
    sizes = {str(folder): folder_bytes(folder) for folder in folders}
    total = size_text(sum(sizes.values()))
    if not (options.json or options.quiet):
        for folder in folders:
            print(_line(folder, sizes[str(folder)]))
    if not options.dry_run:
        agreed(options, f"remove {len(folders)} {'run' if len(folders) == 1 else 'runs'}, {total}?")
        for folder in folders:
            _remove(folder)
    if options.json:
        print_json({"removed": sizes, "bytes": sum(sizes.values()), "dry_run": options.dry_run})
    else:
        print(f"{'would free' if options.dry_run else 'freed'} {total}; spec cache lists what the cache still holds")
    return 0


def _folder(name: str, runs: Path) -> Path:
    place = RunFolder(Path(name))
    return place.path if place.is_rerun else find_run(name, runs).path


def _refuse_unsafe(folder: Path) -> None:
    if folder.is_symlink():
        raise RecipeError(
            [Problem("", f"{folder} is a link to {folder.resolve()}", "name that folder, or remove the link")]
        )
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise RecipeError(
            [Problem("", f"{folder} is the working folder, or holds it", "change to another folder first")]
        )
    if is_locked(folder):
        raise _at_work(folder)


def _at_work(folder: Path) -> ArtifactError:
    return ArtifactError(
        f"{folder}: a launch is working on this run", hint="wait until it ends, or stop it with Ctrl-C"
    )


def _line(folder: Path, size: int) -> str:
    known = summary(RunFolder(folder))
    tau = f", tau {known.best.tau:.3f}" if known.best else ""
    return f"{folder}  {size_text(size)}, {known.state}{tau}"


def _remove(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.removed")
    with locked_or_refused(folder, _at_work(folder)), disk_errors(folder):
        # Renamed first: what is interrupted half-way never looks like a run.
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        shutil.rmtree(aside)
