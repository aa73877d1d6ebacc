"""Compares variants of a recipe over seeds: makes the runs that are missing, then one table with intervals.

A file names a base recipe, variants as --set lists, and seeds:

  format = 1
  recipe = "quickstart"
  seeds = [0, 1, 2]
  [variants]
  "ttt 4" = ["algorithm.ttt_steps=4"]
  "adamw" = ["schedule.optimizer={name='adamw', lr=1e-3}"]

Every run is an ordinary one, as spec run makes it; those that are done are not made again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from speculators.ablation.arms import Contest, load_arms
from speculators.ablation.document import load_ablation
from speculators.errors import Problem, RecipeError

from .common import add_runs, natural, print_json

if TYPE_CHECKING:  # torch comes with them
    from speculators.ablation.result import AblationResult
    from speculators.ablation.runs import ArmRun

FOLDER = "ablations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "a TOML file, or the name of an ablation that ships with the package"
    parser.add_argument("file", metavar="FILE", help=text)
    parser.add_argument(
        "--plan", action="store_true", help="only show the runs, which of them are done, and the time left"
    )
    text = "seeds for the base and every variant, instead of the file's"
    parser.add_argument("--seeds", metavar="N", type=natural, nargs="+", help=text)
    add_runs(parser)


def run(options: argparse.Namespace) -> int:
    """Makes the runs and prints the table; returns 1 if a run failed, or if live decoding disagrees with its number."""
    # Before torch is imported, so that errors in the file appear at once.
    contest = load_arms(load_ablation(options.file, options.seeds))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = f"spec ablate {options.file} --plan --json prints the command of each run; then call this for the table"
        raise RecipeError([Problem("", "spec ablate works in one process", hint)])
    from speculators.ablation.runs import plan_runs

    runs = plan_runs(contest)
    return _show_plan(runs, contest, options) if options.plan else _make(runs, contest, options)


def _show_plan(runs: tuple[ArmRun, ...], contest: Contest, options: argparse.Namespace) -> int:
    from speculators.ablation.forecast import forecast
    from speculators.runs.places import Places

    plan = forecast(runs, contest, Places(runs=options.runs))
    if options.json:
        print_json(plan.to_json())
        return 0
    from speculators.report.ablation import forecast_tables
    from speculators.report.console import console

    console().print(forecast_tables(plan))
    return 0


def _make(runs: tuple[ArmRun, ...], contest: Contest, options: argparse.Namespace) -> int:
    """Makes the runs; after each seed, the table so far is printed and written to its folder."""
    from speculators.ablation.result import summarize_ablation
    from speculators.ablation.runs import RunBegins, run_all
    from speculators.report.ablation import ablation_table, event_text
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.runs.places import Places
    from speculators.training.world import start, stop

    outcomes, folder = {}, options.runs / FOLDER / contest.ablation.name
    err, places, world = console(stderr=True), Places(runs=options.runs), start()
    made = False
    try:
        with RunView(quiet=options.quiet) as view:
            for event in run_all(runs, contest, places=places, world=world, listen=view):
                if (text := event_text(event, contest.ablation.name)) and not (
                    options.quiet and isinstance(event, RunBegins)
                ):
                    err.print(text, soft_wrap=True)
                if isinstance(event, RunBegins):
                    continue
                outcomes[event.run.arm, event.run.seed] = event.outcome
                made = made or not event.was_done
                if len(outcomes) % len(contest.arms) == 0 and made and len(outcomes) < len(runs):
                    result = summarize_ablation(contest, outcomes)
                    _write(result, folder)
                    if not options.quiet:
                        err.print(ablation_table(result))
                    made = False
    except KeyboardInterrupt:
        print(f"to go on: {_command(options)}", file=sys.stderr)
        raise
    finally:
        stop(world)
    return _report(summarize_ablation(contest, outcomes), folder, options)


def _report(result: AblationResult, folder: Path, options: argparse.Namespace) -> int:
    note = _write(result, folder)
    if options.json:
        print_json(result.to_json())
    else:
        from speculators.report.ablation import ablation_table
        from speculators.report.console import console

        console().print(ablation_table(result))
        if not options.quiet:
            print(f"\n{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}{note}")
    return 0 if result.is_sound else 1


def _write(result: AblationResult, folder: Path) -> str:
    """Writes JSON, Markdown and plot; returns what to say of a plot that is missing."""
    from speculators.errors import SpeculatorsError
    from speculators.files.disk import disk_errors, write_json, write_whole
    from speculators.report.ablation import ablation_markdown, ablation_plot
    from speculators.report.plots import check_matplotlib

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # An earlier call's, of other runs.
        (folder / "plot.svg").unlink(missing_ok=True)
    write_json(folder / "ablation.json", result.to_json())
    write_whole(folder / "table.md", ablation_markdown(result).encode())
    try:
        check_matplotlib()
    except SpeculatorsError as error:
        return f"; {error.problems[0].message} ({error.problems[0].hint})"
    if drawn := ablation_plot(result):
        write_whole(folder / "plot.svg", drawn.encode())
    return ""


def _command(options: argparse.Namespace) -> str:
    seeds = ["--seeds", *map(str, options.seeds)] if options.seeds else []
    return shlex.join(["spec", "ablate", options.file, "--runs", str(options.runs), *seeds])
