"""Writes a report of runs: one HTML file with plots, numbers, plan, lock and differences, to be opened anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = "run folders; of several, curves are laid over each other and the first is what others are compared with"
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help=text)
    text = "compare with this run, the parent; it is on the page, too"
    parser.add_argument("--against", metavar="RUN", type=Path, help=text)
    parser.add_argument("--out", metavar="FILE", type=Path, help="instead of report.html in the (first) RUN")


def run(options: argparse.Namespace) -> int:
    """Writes the page and prints where it is, and what the runs lack."""
    from speculators.files.disk import write_whole
    from speculators.report.gather import gather
    from speculators.report.html import page

    first = [options.against] if options.against else []
    report = gather([*first, *options.runs])
    out = options.out or options.runs[0] / "report.html"
    write_whole(out, page(report).encode())
    missing = {each["name"]: each["missing"] for each in report["runs"]}
    if options.json:
        print_json({"report": str(out), "missing": missing})
        return 0
    if not options.quiet:
        for name, words in missing.items():
            for line in words:
                print(f"{name}: {line}")
    print(out)
    return 0
