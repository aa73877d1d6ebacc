"""Renders a comparison of two recipes or runs, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.diff.comparison import Comparison, StageChange, ValueChange, value_text
from speculators.report.recipe import plain_table

_BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def diff_tables(result: Comparison) -> RenderableType:
    """Lays out changes by section, stages, whether results are comparable, and what runs measured."""
    parts: list[RenderableType] = []
    for section in dict.fromkeys(change.section for change in result.changes):
        table = plain_table(section, result.a, result.b, "means")
        for change in result.changes:
            if change.section == section:
                sides = [
                    f"{escape(value_text(value))}\n[note]{escape(origin)}[/note]" for value, origin in _sides(change)
                ]
                table.add_row(escape(change.path), *sides, escape(change.consequence))
        parts += [table, Text()]
    if not result.changes:
        parts += [Text(result.without_changes), Text()]
    if result.stages:
        table = plain_table("stage", "", "because of", "costs")
        for stage in result.stages:
            table.add_row(*map(escape, _stage_cells(stage)))
        parts += [table, Text()]
    parts.append(Text.assemble((result.headline, "title"), ": ", "; ".join(result.reasons)))
    parts += [Text(line) for line in _metric_lines(result)]
    parts += [Text(line) for line in curve_lines(result)]
    parts += [Text(line, style="note") for line in (*_environment_lines(result), *result.notes)]
    return Group(*parts)


def to_markdown(result: Comparison) -> str:
    """Writes the comparison as Markdown, for a pull request."""
    lines = [f"### `{result.a}` against `{result.b}`", ""]
    if result.changes:
        lines += [_row("key", result.a, result.b, "means"), "|---|---|---|---|"]
        for change in result.changes:
            sides = " | ".join(
                _cell(value_text(value)) + (f"<br><sub>{_cell(origin)}</sub>" if origin else "")
                for value, origin in _sides(change)
            )
            lines.append(f"| `{_cell(change.path)}` | {sides} | {_cell(change.consequence)} |")
    else:
        sentence = result.without_changes
        lines.append(f"{sentence[0].upper()}{sentence[1:]}.")
    if result.stages:
        lines += ["", _row("stage", "", "because of", "costs"), "|---|---|---|---|"]
        lines += [_row(*_stage_cells(stage)) for stage in result.stages]
    lines += ["", f"**{result.headline}**: {'; '.join(result.reasons)}."]
    lines += _list(_metric_lines(result))
    lines += _list(f"`{line}`" for line in curve_lines(result))
    lines += _list(_environment_lines(result))
    lines += _list(result.notes)
    return "\n".join(lines) + "\n"


def _sides(change: ValueChange) -> tuple[tuple[object, str], tuple[object, str]]:
    return (change.before, change.before_from), (change.after, change.after_from)


def _stage_cells(stage: StageChange) -> tuple[str, str, str, str]:
    return stage.stage, stage.status, ", ".join(stage.because), stage.cost or ""


def _metric_lines(result: Comparison) -> list[str]:
    return [str(row) for row in result.runs.metrics] if result.runs else []


def _environment_lines(result: Comparison) -> list[str]:
    environment = result.runs.environment if result.runs else {}
    return [f"{key}: {before} -> {after}" for key, (before, after) in environment.items()]


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Escapes whatever would end a cell or its row."""
    return text.replace("|", "\\|").replace("\n", " ")


def _list(lines: Iterable[str]) -> list[str]:
    """Writes a bullet list with the empty line before it; nothing for no lines."""
    items = [f"* {line}" for line in lines]
    return ["", *items] if items else []


def curve_lines(result: Comparison) -> list[str]:
    """Draws what the runs logged while they trained, one line of bars for each curve."""
    if result.runs is None:
        return []
    return [
        f"{name}, {side}  {sparkline(values)}"
        for side, curves in zip((result.a, result.b), result.runs.curves, strict=True)
        for name, values in (("loss", curves.loss), ("tau", curves.tau))
        if values
    ]


def sparkline(values: Sequence[float]) -> str:
    """Draws values as bars between the first and the last value; each bar is the mean of an equal part."""
    size = min(WIDTH, len(values))
    cuts = [round(index * len(values) / size) for index in range(size + 1)]
    means = [sum(values[i:j]) / (j - i) for i, j in pairwise(cuts)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    bars = "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / span * len(_BARS)))] for mean in means)
    return f"{values[0]:.3f} {bars} {values[-1]:.3f}"
