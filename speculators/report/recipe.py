"""Tables of recipes: their values, where each comes from, and the list of all recipes and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from speculators.recipe.explain import Why
from speculators.runs.summary import RunSummary


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
    recipes: Sequence[Mapping[str, Any]], algorithms: Sequence[str], runs: Sequence[RunSummary], *, long: bool = False
) -> RenderableType:
    """Renders the runs, then the recipes by verifier and the algorithms.

    Args:
        long: print each recipe's purpose and known results below its line.
    """
    parts: list[RenderableType] = [_runs_table(runs)] if runs else [Text("no runs here; spec run quickstart_short")]
    parts += [Text(), _recipes_table(recipes, long=long)]
    return Group(*parts, Text.assemble(("\nalgorithms ", "title"), ", ".join(algorithms) or "none"))


def _runs_table(runs: Sequence[RunSummary]) -> Table:
    table = plain_table("run", "last worked", "state", "tau", "speed-up")
    for run in runs:
        best, when = run.best, run.last_worked
        changes = "".join(f"\n  {path} = {_toml(value)}" for path, value in run.changes.items())
        table.add_row(
            escape(run.folder.name) + f"[note]{escape(changes)}[/]",
            f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M}" if when else "",
            escape(run.state),
            f"{best.tau:.3f} (K={best.num_speculative_tokens})" if best else "",
            f"{best.speed_up:.2f}" if best and best.speed_up else "",
        )
    return table


def _recipes_table(recipes: Sequence[Mapping[str, Any]], *, long: bool) -> Table:
    table = plain_table("recipe", "algorithm", "usual time", "tau")
    # A folded name cannot be copied.
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for family in sorted({recipe["family"] for recipe in recipes}):
        table.add_row(Text(f"for {family}", style="title"))
        for recipe in (recipe for recipe in recipes if recipe["family"] == family):
            bands = recipe["expect"]
            # The largest K comes last.
            reach = " to ".join(f"{bound:g}" for bound in list(bands.values())[-1]) if bands else ""
            table.add_row(*map(escape, (f"  {recipe['name']}", recipe["algorithm"], recipe["usual_time"], reach)))
            if long:
                known = [f"{name}: tau {low:g} to {high:g}" for name, (low, high) in bands.items()]
                lines = [recipe["summary"], *(known or ["not measured yet"])]
                table.add_row("", "", Text("\n".join(lines), style="note"))
    return table


def plain_table(*columns: str) -> Table:
    """Makes a table without lines, whose first column is styled as names."""
    table = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="title")
    for index, column in enumerate(columns):
        table.add_column(column, style="name" if index == 0 else None, overflow="fold")
    return table


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
