"""Runs a recipe: every stage that is not done, then the acceptance table. Called again, it resumes where it stopped."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import attrs

from speculators.recipe.expect import band_lines, compare_bands

from .common import add_recipe, add_wide, count, load_checked, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="where runs are kept (default: ./runs)"
    )
    parser.add_argument("--nproc", metavar="N", type=count, default=1, help="processes on this machine (default: 1)")
    add_wide(parser)
    parser.add_argument("--resume", action="store_true", help="resume a run where it stopped (the default)")


def run(options: argparse.Namespace) -> int:
    """Runs the stages and prints the result."""
    # Before torch is imported, so that errors in a recipe appear at once.
    recipe = load_checked(options)
    if options.nproc > 1 and "RANK" not in os.environ:
        return _launch(options)
    from speculators.bench.result import taus
    from speculators.pipeline import Places, run_recipe
    from speculators.report.bench import bench_tables
    from speculators.report.conclusion import conclusion
    from speculators.report.console import console
    from speculators.report.progress import RunView, duration
    from speculators.training.world import start, stop

    world = start()
    try:
        with RunView(quiet=options.quiet) as view:
            outcome = run_recipe(recipe, places=Places(runs=options.runs), world=world, listen=view)
    finally:
        stop(world)
    if not world.is_main:
        return 0
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


def _launch(options: argparse.Namespace) -> int:
    from speculators.training.launch import launch

    arguments = ["-m", "speculators.cli", "run", options.recipe, "--runs", str(options.runs)]
    arguments += [part for override in options.overrides for part in ("--set", override)]
    flags = (("--json", options.json), ("--quiet", options.quiet), ("--wide", options.wide))
    arguments += [flag for flag, is_set in flags if is_set]
    return launch(arguments, nproc=options.nproc)
