"""Runs a recipe: every stage that is not done, then the acceptance table. Interrupted, it goes on when called again."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from speculators.errors import SpeculatorsError

from .common import add_recipe, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="where runs are kept (./runs)"
    )
    parser.add_argument("--nproc", metavar="N", type=int, default=1, help="processes on this machine (1)")
    parser.add_argument("--resume", action="store_true", help="go on where a run stopped, which is done in any case")


def run(options: argparse.Namespace) -> int:
    """Runs the stages and prints the result."""
    from speculators.recipe.load import load_recipe

    # Before torch is imported: a bad recipe is told at once.
    recipe = load_recipe(options.recipe, options.overrides)
    if options.nproc > 1 and "RANK" not in os.environ:
        return _launch(options)
    from speculators.pipeline import Places, run_recipe
    from speculators.report.bench import bench_tables
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
    if options.json:
        print_json({"run": str(outcome.folder), "seconds": round(outcome.seconds, 1), "bench": outcome.bench})
    elif outcome.bench is not None:
        console().print(bench_tables(outcome.bench))
        console().print(
            f"\n{outcome.folder}: {duration(outcome.seconds)}, peak memory {outcome.peak_memory_gb:.2f} GB",
            style="note",
        )
    return 0 if outcome.bench is None or outcome.bench["agrees"] else 1


def _launch(options: argparse.Namespace) -> int:
    """Starts the processes with torchrun's own launcher; the exit code is theirs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc}"]
    command += ["-m", "speculators.cli", "run", options.recipe, "--runs", str(options.runs)]
    command += [part for override in options.overrides for part in ("--set", override)]
    command += [flag for flag, given in (("--json", options.json), ("--quiet", options.quiet)) if given]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1, 130):
        raise SpeculatorsError(f"the launch of {options.nproc} processes ended with code {code}; see above")
    return code
