"""Writes a report of runs: one HTML file with plots, numbers, plan, lock and differences, readable anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = "run folders; with several, curves share their plots and each run is compared with the first"
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help=text)
    parser.add_argument("--against", metavar="RUN", type=Path, help="compare with this run, which is shown first")
    parser.add_argument("--out", metavar="FILE", type=Path, help="instead of report.html in the (first) RUN")


def run(options: argparse.Namespace) -> int:
    """Writes the page and prints its path, after a list of missing data."""
    from speculators.files.disk import write_whole
    from speculators.report.gather import gather
    from speculators.report.html import page
    from speculators.runs.places import RunFolder

    parent = [options.against] if options.against else []
    report = gather([*parent, *options.runs])
    out = options.out or RunFolder(options.runs[0]).report
    write_whole(out, page(report).encode())
    if options.json:
        print_json({"report": str(out), "missing": {run.name: run.missing for run in report.runs}})
        return 0
    if not options.quiet:
        for run in report.runs:
            for line in run.missing:
                print(f"{run.name}: {line}")
    print(out)
    return 0
