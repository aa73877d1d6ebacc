"""The comparison of two recipes or runs, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.diff.changes import headline, metric_line, text, unchanged
from speculators.report.recipe import plain_table

_BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def diff_tables(result: Mapping[str, Any]) -> RenderableType:
    """Returns the tables of a comparison: changes by section, stages, verdict, and what runs measured."""
    parts: list[RenderableType] = []
    sections = dict.fromkeys(change["section"] for change in result["changes"])
    for section in sections:
        table = plain_table(section, result["a"], result["b"], "means")
        for change in (change for change in result["changes"] if change["section"] == section):
            sides = [
                f"{escape(text(change[side]))}\n[note]{escape(change[f'{side}_from'])}[/note]"
                for side in ("before", "after")
            ]
            table.add_row(escape(change["path"]), *sides, escape(change["consequence"]))
        parts += [table, Text()]
    if not sections:
        parts += [Text(unchanged(result)), Text()]
    if result["stages"]:
        told = plain_table("stage", "", "because of", "costs")
        for stage in result["stages"]:
            cells = (stage["stage"], stage["status"], ", ".join(stage["because"]), stage.get("cost", ""))
            told.add_row(*map(escape, cells))
        parts += [told, Text()]
    parts.append(Text.assemble((headline(result["comparable"]), "title"), ": ", "; ".join(result["reasons"])))
    parts += [Text(metric_line(row)) for row in result.get("metrics", [])]
    parts += [Text(line) for line in curve_lines(result)]
    for key, (before, after) in result.get("environment", {}).items():
        parts.append(Text(f"{key}: {before} -> {after}", style="note"))
    parts += [Text(note, style="note") for note in result["notes"]]
    return Group(*parts)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Returns the comparison as Markdown, for a pull request."""
    lines = [f"### `{result['a']}` against `{result['b']}`", ""]
    if result["changes"]:
        lines += [_row("key", result["a"], result["b"], "means"), "|---|---|---|---|"]
        for change in result["changes"]:
            sides = " | ".join(_with_origin(change, side) for side in ("before", "after"))
            lines.append(f"| `{_cell(change['path'])}` | {sides} | {_cell(change['consequence'])} |")
    else:
        words = unchanged(result)
        lines.append(f"{words[0].upper()}{words[1:]}.")
    if result["stages"]:
        lines += ["", _row("stage", "", "because of", "costs"), "|---|---|---|---|"]
        for stage in result["stages"]:
            lines.append(_row(stage["stage"], stage["status"], ", ".join(stage["because"]), stage.get("cost", "")))
    lines += ["", f"**{headline(result['comparable'])}**: {'; '.join(result['reasons'])}."]
    lines += _list(metric_line(row) for row in result.get("metrics", []))
    lines += _list(f"`{line}`" for line in curve_lines(result))
    lines += _list(f"{key}: {before} -> {after}" for key, (before, after) in result.get("environment", {}).items())
    lines += _list(result["notes"])
    return "\n".join(lines) + "\n"


def _with_origin(change: Mapping[str, Any], side: str) -> str:
    origin = change[f"{side}_from"]
    return _cell(text(change[side])) + (f"<br><sub>{_cell(origin)}</sub>" if origin else "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(told: str) -> str:
    """Returns a text that cannot end its cell or its row."""
    return told.replace("|", "\\|").replace("\n", " ")


def _list(told: Iterable[str]) -> list[str]:
    """Returns the lines of a list, [] for an empty one."""
    items = [f"* {each}" for each in told]
    return ["", *items] if items else []


def curve_lines(result: Mapping[str, Any]) -> list[str]:
    """Returns what was logged while the runs trained, a line of bars each."""
    return [
        f"{name}, {result[side]}  {sparkline(values)}"
        for side, points in result.get("curves", {}).items()
        for name, values in points.items()
        if values
    ]


def sparkline(values: Sequence[float]) -> str:
    """Returns a line of bars, the mean of equal parts of the values, with the first and the last value."""
    size = min(WIDTH, len(values))
    cuts = [round(index * len(values) / size) for index in range(size + 1)]
    means = [sum(values[i:j]) / (j - i) for i, j in pairwise(cuts)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    bars = "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / span * len(_BARS)))] for mean in means)
    return f"{values[0]:.3f} {bars} {values[-1]:.3f}"
