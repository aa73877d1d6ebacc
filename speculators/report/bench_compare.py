"""The tables of several benchmarks side by side, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.bench.comparison import BenchComparison, ComparedRow
from speculators.bench.paired import SHARE, PairedDifference
from speculators.report.bench import LOADED, acceptance_cells, definitions, number_text, rates_text
from speculators.report.conclusion import unreliable
from speculators.report.console import Uncut
from speculators.report.recipe import plain_table

# Positions that fit into 80 columns; `--wide` shows all.
POSITIONS = 8


def comparison_tables(comparison: BenchComparison, *, wide: bool = False) -> RenderableType:
    """Renders for each suite and temperature the numbers of all drafters, and the differences from the first.

    Args:
        wide: whether to show all positions, with two decimals.
    """
    parts: list[RenderableType] = [Text(line, style="note") for line in _places(comparison)]
    for (suite, temperature), group in groupby(comparison.rows, key=_place):
        rows = _without_smaller_baselines(list(group))
        title = f"{suite}, T={temperature:g}, {rows[0].acceptance.prompts} prompts"
        numbers = _numbers(title, rows, wide=wide)
        parts += [Text(), Uncut(numbers) if wide else numbers]
        if any(row.difference or row.incomparable for row in rows):
            parts += [Text(), _differences(comparison.first, rows)]
        parts += [Text(line, style=style) for style, line in _notes(rows)]
    parts.append(Text("\n" + definitions([row.setting for row in comparison.rows]), style="note"))
    return Group(*parts)


def row_label(row: ComparedRow) -> str:
    """Names a row's drafter; a baseline is indented below the speculator that it was measured beside."""
    return f"  {row.baseline}" if row.baseline else row.speculator


def difference_text(difference: PairedDifference) -> str:
    """Writes "+0.031 (+0.01 to +0.05)", or that no difference was shown, with the interval."""
    interval = f"({difference.low:+.2f} to {difference.high:+.2f})"
    return f"{difference.mean:+.3f} {interval}" if difference.shown else f"none shown {interval}"


def _place(row: ComparedRow) -> tuple[str, float]:
    return row.setting.suite, row.setting.temperature


def _without_smaller_baselines(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """Leaves out baselines below the largest K, at which they were not timed."""
    largest = max(row.setting.num_speculative_tokens for row in rows)
    return [row for row in rows if not row.baseline or row.setting.num_speculative_tokens == largest]


def _places(comparison: BenchComparison) -> Iterator[str]:
    """Says where numbers were measured, once if that is the same for all, and where a machine was busy."""
    places: dict[str, list[str]] = {}
    busy: dict[str, float] = {}
    for each in comparison.speculators:
        for result in each.results:
            where = f"with {result.verifier}\nin {result.dtype} on {result.device}, {result.threads} threads"
            names = places.setdefault(where, [])
            names += [each.name] if each.name not in names else []
            if result.others is not None and result.others >= LOADED:
                busy[each.name] = max(result.others, busy.get(each.name, 0.0))
    for where, names in places.items():
        yield where if len(places) == 1 else f"{where}: {', '.join(names)}"
    for name, others in busy.items():
        yield f"{name}: other processes used {others:.1f} CPUs meanwhile, which makes its times longer"


def _numbers(title: str, rows: Sequence[ComparedRow], *, wide: bool) -> Table:
    shown = max(len(row.acceptance.by_position) for row in rows) if wide else POSITIONS
    cut = any(len(row.acceptance.by_position) > shown for row in rows)
    positions = f"first {shown} drafts, %" if cut else "by position" if wide else "by position, %"
    table = plain_table("drafts", "K", "tau (95%)", positions, "speed-up")
    table.title, table.title_justify = escape(title), "left"
    _keep_numbers(table, left=(positions,))
    for row in rows:
        k, tau, *_ = acceptance_cells(row.setting.num_speculative_tokens, row.acceptance)
        rates = row.acceptance.by_position[:shown]
        table.add_row(
            escape(row_label(row)), k, tau, rates_text(rates) if wide else _percentages(rates), _speed_cell(row)
        )
    return table


def _differences(first: str, rows: Sequence[ComparedRow]) -> Table:
    """Compares all drafters with the first speculator, at the largest K."""
    largest = max(row.setting.num_speculative_tokens for row in rows)
    table = plain_table("drafts", f"tau minus {first}'s (95%)" if len(first) < 20 else "tau minus the first's (95%)")
    table.add_column(f"{SHARE:.0%} needs", header_style="title")
    table.title, table.title_justify = f"K={largest}, the same prompts resampled together", "left"
    _keep_numbers(table)
    for row in rows:
        if row.setting.num_speculative_tokens != largest:
            continue
        if row.difference:
            needed = f"{row.difference.prompts_for_share:,} prompts"
            table.add_row(escape(row_label(row)), difference_text(row.difference), needed)
        elif row.incomparable:
            table.add_row(escape(row_label(row)), "not compared", "")
    return table


def _keep_numbers(table: Table, left: Sequence[str] = ()) -> None:
    """Aligns all columns but the first to the right, and never breaks them."""
    for column in table.columns[1:]:
        column.no_wrap = True
        column.justify = "left" if column.header in left else "right"


def _percentages(rates: Iterable[float]) -> str:
    return " ".join("-" if math.isnan(rate) else f"{100 * rate:.0f}" for rate in rates)


def _speed_cell(row: ComparedRow) -> str:
    if row.speed is None:
        return "-"
    text = f"{number_text(row.speed.speed_up, 2)}x"
    return f"[warn]{text}?[/]" if row.speed.unmatched_baseline else text


def _notes(rows: Sequence[ComparedRow]) -> list[tuple[str, str]]:
    """Lists what to know beside the numbers of one suite and temperature, as (style, line)."""
    lines: dict[tuple[str, str], None] = {}
    for row in rows:
        name = f"{row.baseline or row.speculator}, K={row.setting.num_speculative_tokens}"
        live = row.setting.live
        if live and not live.agreement.agrees and not row.baseline:
            lines["bad", f"{name}: live and replay disagree: {live.agreement.gap}"] = None
        if row.speed and row.speed.unmatched_baseline:
            lines["warn", f"{name}: {unreliable(row.speed.speed_up)}"] = None
        if row.incomparable:
            lines["note", f"{row.baseline or row.speculator}: not compared: {row.incomparable}"] = None
        if row.setting.note:
            lines["note", row.setting.note] = None
    if any(row.speed for row in rows):
        lines["note", "speed-ups: over plain decoding beside each speculator, not all at one time"] = None
    return list(lines)
