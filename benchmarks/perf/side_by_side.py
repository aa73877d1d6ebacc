"""Two programs at one task, in turn, each run in a process of its own; what they print is put beside each other.

A program reports by one line on stdout that begins with `RESULT ` and goes on with a JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

MARK = "RESULT "

# Both sides find their own packages: ours from the current folder, a peer of the same import name from its environment.
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME")


@attrs.frozen
class Side:
    """One program.

    Attributes:
        name: for the table.
        command: interpreter, script and options.
    """

    name: str
    command: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Column:
    """One figure to compare.

    Attributes:
        key: its name in the result.
        title: for the table.
        higher_is_better: which of (ours / theirs) and (theirs / ours) is printed.
        digits: behind the point.
    """

    key: str
    title: str
    higher_is_better: bool = True
    digits: int = 0


def report(result: Mapping[str, Any]) -> None:
    """Prints a result for whoever started this process."""
    print(MARK + json.dumps(result), flush=True)


def run(side: Side, *, threads: int) -> dict[str, Any]:
    """Runs one program to its end and returns its result.

    Raises:
        RuntimeError: it failed, or did not report; with the end of what it printed.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment = {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(side.command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or not lines:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(side.command)}\nended with {done.returncode}:\n{tail}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return result


def interleave(sides: Sequence[Side], *, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Runs all sides in turn, `rounds` times, so that a machine that slows down slows all of them.

    Returns:
        The results of each side by its name, in order.
    """
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            before = os.getloadavg()[0]
            result = {**run(side, threads=threads), "load_before": round(before, 2)}
            found[side.name].append(result)
            print(f"  round {number + 1}/{rounds} {side.name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return found


def medians(results: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> dict[str, float]:
    """Returns the median of each column over a side's results."""
    return {column.key: statistics.median(float(result[column.key]) for result in results) for column in columns}


def table(cells: Mapping[str, Mapping[str, list[dict[str, Any]]]], columns: Sequence[Column]) -> str:
    """Returns the medians of every side in every cell as a Markdown table, with ours over theirs.

    Args:
        cells: cell -> side -> results; the first side is ours.
        columns: what to compare.
    """
    titles = [title for column in columns for title in (f"{column.title}, ours", "peer", "ratio")]
    lines = [f"| cell | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for cell, sides in cells.items():
        ours, theirs = (medians(results, columns) for results in sides.values())
        values = []
        for column in columns:
            a, b = ours[column.key], theirs[column.key]
            values += [
                f"{a:,.{column.digits}f}",
                f"{b:,.{column.digits}f}",
                f"{a / b if column.higher_is_better else b / a:.2f}",
            ]
        lines.append(f"| {cell} | {' | '.join(values)} |")
    return "\n".join(lines)
