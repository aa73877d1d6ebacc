"""Draws tau against the tokens trained on, with a line for each algorithm, and prints the table.

    python -m benchmarks.curve runs/A runs/B ... --out benchmarks/tau_by_tokens.svg [--k 5]

The runs of an algorithm should differ only in their data. tau is that of the first suite at T = 0, with its 95%
interval over prompts. A token counts each time it is trained on; the prompts' tokens count, too.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from speculators.bench.result import Acceptance
from speculators.events import StepEvent
from speculators.report.gather import gather_run
from speculators.report.plots import Series, image, lines, run_colour
from speculators.runs.log import RunLog
from speculators.runs.places import RunFolder

HEADER = "| algorithm | tokens | tau (95%) | accepted by position |"


@attrs.frozen(kw_only=True)
class Point:
    """One run: the tokens that it trained on, and the tau that it reached."""

    tokens: int
    reached: Acceptance


def points(folders: Sequence[Path], k: int) -> Mapping[str, list[Point]]:
    """Reads the runs and sorts those of each algorithm by their tokens."""
    by_algorithm = defaultdict(list)
    for folder in folders:
        run = gather_run(folder, folder.name)
        if not run.settings:
            raise SystemExit(f"{folder}: {'; '.join(run.missing)}")
        # A resumed run repeats updates.
        by_update = {update.step: update.tokens for update in RunLog.read(RunFolder(folder).events).of(StepEvent)}
        suite = run.settings[0].suite
        reached = next(
            setting.exact
            for setting in run.settings
            if (setting.suite, setting.temperature, setting.num_speculative_tokens) == (suite, 0.0, k)
        )
        by_algorithm[run.recipe["algorithm.name"]].append(Point(tokens=sum(by_update.values()), reached=reached))
    return {name: sorted(each, key=lambda point: point.tokens) for name, each in by_algorithm.items()}


def table(curves: Mapping[str, Sequence[Point]]) -> str:
    """Formats the points as Markdown."""
    rows = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for name, curve in curves.items():
        for point in curve:
            low, high = point.reached.tau_interval
            rates = " ".join(f"{rate:.2f}" for rate in point.reached.by_position)
            rows.append(f"| {name} | {point.tokens:,} | {point.reached.tau:.3f} ({low:.2f} to {high:.2f}) | {rates} |")
    return "\n".join(rows)


def plot(curves: Mapping[str, Sequence[Point]], k: int) -> str:
    """Draws the curves as an SVG file, with tokens on a logarithmic axis."""
    series = [
        Series(
            name=name,
            x=[point.tokens for point in curve],
            y=[point.reached.tau for point in curve],
            intervals=[point.reached.tau_interval for point in curve],
            colour=run_colour(index),
            marks=True,
        )
        for index, (name, curve) in enumerate(curves.items())
    ]
    across = f"tau, K = {k}, T = 0"
    drawn = lines("tau by tokens", series, x="tokens trained on", y=across, logarithmic=True, named=True)
    return image(drawn)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("tau_by_tokens.svg"))
    parser.add_argument("--k", type=int, default=5)
    options = parser.parse_args()
    curves = points(options.runs, options.k)
    print(table(curves))
    options.out.write_text(plot(curves, options.k), encoding="utf-8")


if __name__ == "__main__":
    main()
