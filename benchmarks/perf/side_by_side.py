"""Compares two programs at one task: runs them in turn, each in a process of its own, and tabulates their results.

A program reports its result as one line on stdout: `RESULT ` and a JSON object.
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

# The peer's package has our import name: each side must find its own, ours in the current folder.
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME")


@attrs.frozen
class Side:
    """One program to time.

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
        higher_is_better: the ratio is ours / theirs if true, theirs / ours if false.
        digits: after the decimal point.
    """

    key: str
    title: str
    higher_is_better: bool = True
    digits: int = 0


def report(result: Mapping[str, Any]) -> None:
    """Prints a result for the process that started this one."""
    print(MARK + json.dumps(result), flush=True)


def run(side: Side, *, threads: int) -> dict[str, Any]:
    """Runs one program and returns its result.

    Raises:
        RuntimeError: it failed or reported nothing; the message ends with the last lines of its output.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(side.command, env={**inherited, **settings}, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or not lines:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(side.command)}\nended with {done.returncode}:\n{tail}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return result


def interleave(sides: Sequence[Side], *, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Runs all sides in turn, `rounds` times, so that a slow moment of the machine affects all of them.

    Returns:
        Each side's results in order, by its name.
    """
    results: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            before = os.getloadavg()[0]
            result = {**run(side, threads=threads), "load_before": round(before, 2)}
            results[side.name].append(result)
            print(f"  round {number + 1}/{rounds} {side.name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return results


def medians(results: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> dict[str, float]:
    """Takes the median of each column over a side's results."""
    return {column.key: statistics.median(float(result[column.key]) for result in results) for column in columns}


def table(cells: Mapping[str, Mapping[str, list[dict[str, Any]]]], columns: Sequence[Column]) -> str:
    """Formats the medians of both sides and their ratio as a Markdown table, one row per cell.

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
