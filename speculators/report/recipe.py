"""Tables of recipes: their values, where each comes from, and the list of all recipes and runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from speculators.recipe.explain import Why
from speculators.runs.summary import RunSummary

# Changed files of one source that are listed by name.
FILES_LISTED = 5


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
            "changed": "\n".join([*why.changed[:FILES_LISTED], *_more(why.changed)]),
        }
        for name, text in lines.items():
            if text:
                table.add_row(name, Text(text))
        parts.append(Padding(table, (0, 0, 0, 4), expand=False))
    return Group(*parts)


def _more(lines: Sequence[str]) -> list[str]:
    return [f"and {len(lines) - FILES_LISTED} more"] if len(lines) > FILES_LISTED else []


def listing(
    recipes: Sequence[Mapping[str, Any]], algorithms: Sequence[str], runs: Sequence[RunSummary], *, long: bool = False
) -> RenderableType:
    """Renders the runs, then the recipes by verifier and the algorithms.

    Args:
        long: print each recipe's purpose and known results below its line.
    """
    parts: list[RenderableType] = [_runs_table(runs)] if runs else [Text("no runs here; spec run quickstart_short")]
    parts += _recipe_tables(recipes, long=long)
    return Group(*parts, Text.assemble(("\nalgorithms ", "title"), ", ".join(algorithms) or "none"))


def _runs_table(runs: Sequence[RunSummary]) -> Table:
    table = plain_table("run", "last worked", "state", "tau", "speed-up")
    for run in runs:
        best, when = run.best, run.last_worked
        # The last part of the key alone, or long keys would push the numbers off the screen; --json has all of it.
        changes = "".join(f"\n  {path.rpartition('.')[2]} = {_toml(value)}" for path, value in run.changes.items())
        table.add_row(
            escape(run.folder.name) + f"[note]{escape(changes)}[/]",
            f"{datetime.fromtimestamp(when):%m-%d %H:%M}" if when else "",
            escape(run.state),
            f"{best.tau:.3f} (K={best.num_speculative_tokens})" if best else "",
            f"{best.speed_up:.2f}" if best and best.speed_up else "",
        )
    return table


def _recipe_tables(recipes: Sequence[Mapping[str, Any]], *, long: bool) -> Iterator[RenderableType]:
    """Yields a heading for each verifier and a table of its recipes, with columns below one another."""
    names = max(len(recipe["name"]) for recipe in recipes)
    times = max(len(recipe["usual_time"]) for recipe in recipes)
    for family in sorted({recipe["family"] for recipe in recipes}):
        yield Text(f"\nrecipes for {family}", style="title")
        table = plain_table()
        for width, style in ((names, "name"), (9, None), (times, None), (None, None)):
            # A folded name cannot be copied.
            table.add_column(min_width=width, style=style, no_wrap=width is not None)
        for recipe in (recipe for recipe in recipes if recipe["family"] == family):
            bands = recipe["expect"]
            reach = "tau {:.2f} to {:.2f}".format(*max(bands.values())) if bands else ""
            table.add_row(*map(escape, (recipe["name"], recipe["algorithm"], recipe["usual_time"], reach)))
        yield table
        if long:
            yield Padding(_known_results(recipe for recipe in recipes if recipe["family"] == family), (0, 0, 0, 2))


def _known_results(recipes: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Renders the purpose of each recipe and what it is known to reach."""
    lines = []
    for recipe in recipes:
        known = [f"  {name}: tau {low:.2f} to {high:.2f}" for name, (low, high) in recipe["expect"].items()]
        lines += [f"{recipe['name']}: {recipe['summary']}", *(known or ["  no measured band"])]
    return Text("\n".join(lines), style="note")


def plain_table(*columns: str) -> Table:
    """Makes a table without lines, whose first column is styled as names."""
    table = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="title")
    for index, column in enumerate(columns):
        table.add_column(column, style="name" if index == 0 else None, overflow="fold")
    return table


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
