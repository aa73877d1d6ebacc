"""The comparison of two recipes or runs, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.recipe.diff import headline, metric_line, text
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
        parts += [Text("no difference in meaning"), Text()]
    if result["stages"]:
        told = plain_table("stage", "")
        for stage in result["stages"]:
            told.add_row(stage["stage"], stage["status"])
        parts += [told, Text()]
    parts.append(Text.assemble((headline(result["comparable"]), "title"), ": ", "; ".join(result["reasons"])))
    parts += [Text(metric_line(row)) for row in result.get("metrics", [])]
    for side, points in result.get("curves", {}).items():
        parts += [Text(f"{name}, {result[side]}  {sparkline(values)}") for name, values in points.items() if values]
    for key, (before, after) in result.get("environment", {}).items():
        parts.append(Text(f"{key}: {before} -> {after}", style="note"))
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """Returns a line of bars, the mean of equal parts of the values, with the first and the last value."""
    size = min(WIDTH, len(values))
    cuts = [round(index * len(values) / size) for index in range(size + 1)]
    means = [sum(values[i:j]) / (j - i) for i, j in pairwise(cuts)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    bars = "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / span * len(_BARS)))] for mean in means)
    return f"{values[0]:.3f} {bars} {values[-1]:.3f}"
