"""Runs a recipe: every stage that is not done, then the acceptance table. Called again, it resumes where it stopped."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from speculators.errors import Problem, RecipeError
from speculators.events import Event, RunEvent
from speculators.recipe.expect import band_lines, compare_bands
from speculators.recipe.schema import Recipe
from speculators.structure.spelling import toml_text

from .common import add_recipe, add_runs, add_wide, count, load_checked, print_json

if TYPE_CHECKING:  # torch comes with it
    from speculators.pipeline import RunOutcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    add_runs(parser)
    parser.add_argument("--nproc", metavar="N", type=count, default=1, help="processes on this machine (default: 1)")
    add_wide(parser)
    text = "call the run NAME: its folder is NAME-FINGERPRINT, and other commands find it by NAME"
    parser.add_argument("--name", metavar="NAME", help=text)
    text = "hash a complete store of states at the start (default: states are compared when first read)"
    parser.add_argument("--verify", action="store_true", help=text)
    parser.add_argument("--resume", action="store_true", help="resume a run where it stopped (the default)")


def run(options: argparse.Namespace) -> int:
    """Runs the stages and prints the result."""
    if options.name is not None:
        options.overrides = [*options.overrides, f"name={toml_text(options.name)}"]
    # Before torch is imported, so that errors in a recipe appear at once.
    recipe = load_checked(options)
    if options.name is not None and options.resumed is not None:
        problem = Problem("--name", f"{options.resumed.path} has its name already", "leave it out, or name a recipe")
        raise RecipeError([problem])
    if options.nproc > 1 and "RANK" not in os.environ:
        return _launch(options)
    if recipe.usual_time and not options.quiet and os.environ.get("RANK", "0") == "0":
        print(f"{recipe.name}: usual time {recipe.usual_time}", file=sys.stderr)
    outcome = _run(recipe, options)
    return 0 if outcome is None else _report(outcome, recipe, options)


def _run(recipe: Recipe, options: argparse.Namespace) -> RunOutcome | None:
    """Runs the stages; None on every process but the first."""
    from speculators.pipeline import Places, run_recipe
    from speculators.report.progress import RunView
    from speculators.training.world import start, stop, unused_gpus

    places = Places(runs=options.resumed.path.parent if options.resumed else options.runs, resumed=options.resumed)
    folders: list[Path] = []
    world = start()
    if world.is_main and not options.quiet:
        for note in unused_gpus(world):
            print(f"note: {note}", file=sys.stderr)
    try:
        with RunView(quiet=options.quiet) as view:

            def listen(event: Event) -> None:
                if isinstance(event, RunEvent):
                    folders.append(event.folder)
                view(event)

            outcome = run_recipe(recipe, places=places, world=world, listen=listen, verify=options.verify)
    except KeyboardInterrupt:
        if world.is_main:
            print(f"to go on: {_command(options, folders, world.size)}", file=sys.stderr)
        raise
    finally:
        stop(world)
    return outcome if world.is_main else None


def _report(outcome: RunOutcome, recipe: Recipe, options: argparse.Namespace) -> int:
    """Prints the result; returns 1 if live decoding disagrees with replay."""
    from speculators.bench.result import taus
    from speculators.report.bench import bench_tables
    from speculators.report.conclusion import conclusion
    from speculators.report.console import console
    from speculators.report.progress import duration

    code = 0 if outcome.bench is None or outcome.bench.agrees else 1
    bands = compare_bands(recipe.expect, taus(outcome.bench.settings)) if outcome.bench else []
    if options.json:
        seconds = round(outcome.seconds, 1)
        bench = outcome.bench.to_json() if outcome.bench else None
        expect = [attrs.asdict(band) for band in bands]
        print_json({"run": str(outcome.folder), "seconds": seconds, "bench": bench, "expect": expect})
        return code
    if outcome.bench is not None:
        console().print(bench_tables(outcome.bench, wide=options.wide), crop=False)
    for line in band_lines(bands):
        console().print(line, markup=False)
    summary = f"\n{outcome.folder}: {duration(outcome.seconds)}, peak memory {outcome.peak_memory_gb:.2f} GB"
    console().print(summary, style="note", markup=False)
    if outcome.bench is not None:
        console().print(conclusion(outcome.bench, outcome.folder))
    return code


def _command(options: argparse.Namespace, folders: list[Path], processes: int) -> str:
    """The command line that goes on with an interrupted run; the same one again where the run has no folder yet."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return "start the same command again on every machine"
    if folders:
        parts = ["spec", "run", str(folders[0])]
    else:
        parts = ["spec", "run", options.recipe, "--runs", str(options.runs)]
        parts += [part for override in options.overrides for part in ("--set", override)]
    return shlex.join([*parts, *(("--nproc", str(processes)) if processes > 1 else ())])


def _launch(options: argparse.Namespace) -> int:
    from speculators.training.launch import launch

    arguments = ["-m", "speculators.cli", "run", options.recipe, "--runs", str(options.runs)]
    arguments += [part for override in options.overrides for part in ("--set", override)]
    flags = (
        ("--json", options.json),
        ("--quiet", options.quiet),
        ("--wide", options.wide),
        ("--verify", options.verify),
    )
    arguments += [flag for flag, is_set in flags if is_set]
    return launch(arguments, nproc=options.nproc)
