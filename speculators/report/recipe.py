"""Tables of recipes: their values, where each comes from, and the list of all recipes and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from speculators.recipe.explain import Why


def values_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Renders one line per value: its TOML path, the value, where it comes from."""
    table = plain_table()
    table.add_column("key", style="name", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("from", style="note", overflow="fold")
    for path, row in rows.items():
        table.add_row(escape(path), escape(_toml(row["value"])), escape(str(row["origin"])))
    return table


def why_lines(explanations: Sequence[Why]) -> RenderableType:
    """Renders each value with its origin, its meaning and the stages that it decides."""
    parts: list[RenderableType] = []
    for why in explanations:
        parts.append(Text.assemble((why.path, "name"), " = ", _toml(why.value)))
        table = plain_table()
        table.add_column(style="note", no_wrap=True)
        table.add_column(overflow="fold")
        then = f", and through that {', '.join(why.reruns)}" if why.reruns else ""
        lines = {
            "from": why.origin,
            "replaces": f"{_toml(why.replaces['value'])}, from {why.replaces['origin']}" if why.replaces else "",
            "comment": why.comment,
            "means": why.means or "not documented",
            "enters": f"{', '.join(why.enters)}{then}" if why.enters else "no stage's fingerprint: nothing reruns",
        }
        for name, text in lines.items():
            if text:
                table.add_row(name, Text(text))
        parts.append(Padding(table, (0, 0, 0, 4), expand=False))
    return Group(*parts)


def listing(
    recipes: Sequence[Mapping[str, Any]], algorithms: Sequence[str], runs: Sequence[Mapping[str, Any]]
) -> RenderableType:
    """Renders the recipes by verifier, with their needs and known results, then the algorithms and the runs."""
    table = plain_table("recipe", "algorithm", "purpose, hardware and known results")
    # A folded name cannot be copied; the last column takes the rest of 80 characters.
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for family in sorted({recipe["family"] for recipe in recipes}):
        table.add_row(Text(family, style="title"))
        for recipe in (recipe for recipe in recipes if recipe["family"] == family):
            bands = [f"{name}: {low:g} to {high:g}" for name, (low, high) in recipe["expect"].items()]
            needs = f"{recipe['hardware']}; {'known to reach' if bands else 'not measured yet'}"
            cells = (f"  {recipe['name']}", recipe["algorithm"], "\n".join([recipe["summary"], needs, *bands]))
            table.add_row(*map(escape, cells))
    parts: list[RenderableType] = [table, Text.assemble(("\nalgorithms ", "title"), ", ".join(algorithms) or "none")]
    if runs:
        done = plain_table("run", "trained", "measured")
        for run in runs:
            done.add_row(escape(run["name"]), *("yes" if run[key] else "no" for key in ("trained", "measured")))
        parts += [Text(), done]
    else:
        parts.append(Text.assemble(("runs       ", "title"), "none here; spec run quickstart makes the first"))
    return Group(*parts)


def plain_table(*columns: str) -> Table:
    """Makes a table without lines, whose first column is styled as names."""
    table = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="title")
    for index, column in enumerate(columns):
        table.add_column(column, style="name" if index == 0 else None, overflow="fold")
    return table


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
