"""Writes a report of runs: one HTML file with plots, numbers, plan, lock and differences, readable anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from speculators.runs.places import RunFolder, find_run

from .common import RUN_HELP, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = f"{RUN_HELP}; with several, curves share their plots and each run is compared with the first"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=text)
    parser.add_argument("--against", metavar="RUN", help="compare with this run, which is shown first")
    parser.add_argument("--out", metavar="FILE", type=Path, help="instead of report.html in the (first) RUN")


def run(options: argparse.Namespace) -> int:
    """Writes the page and prints its path, after a list of missing data."""
    named = [name for name in options.runs if not _is_rerun(name)] or options.runs
    parent = [find_run(options.against).path] if options.against else []
    folders = [find_run(name).path for name in named]
    from speculators.files.disk import write_whole
    from speculators.report.gather import gather
    from speculators.report.html import page

    report = gather([*parent, *folders])
    out = options.out or RunFolder(folders[0]).report
    write_whole(out, page(report).encode())
    if options.json:
        print_json({"report": str(out), "missing": {run.name: run.missing for run in report.runs}})
        return 0
    if not options.quiet:
        for run in report.runs:
            for line in run.missing:
                print(f"{run.name}: {line}")
        for name in options.runs:
            if name not in named:
                print(f"{name}: left out: a re-run by spec reproduce; its run is {name}/runs/...")
    print(out)
    return 0


def _is_rerun(name: str) -> bool:
    """Whether this is the folder of a re-run, which `spec report runs/*` comes across."""
    return RunFolder(Path(name)).is_rerun
