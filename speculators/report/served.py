"""The tables of a benchmark on a running server, and of a run's ledger, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.report.bench import number_text, rates_text
from speculators.report.conclusion import unreliable
from speculators.report.console import Uncut
from speculators.runs.ledger import Ledger
from speculators.runs.ledger_entries import LedgerEntry
from speculators.servers.load import Spread
from speculators.servers.result import ServedResult, ServedSetting

_LEFT = ("suite", "kind", "source", "server")


def served_tables(result: ServedResult, *, wide: bool = False) -> RenderableType:
    """Renders acceptance, pace and definitions of a benchmark on a server.

    Args:
        wide: whether to print the columns that do not fit into 80 columns.
    """
    where = f"{result.engine} {result.version}, {result.model} at {result.endpoint}, concurrency {result.concurrency}"
    parts: list[RenderableType] = [
        Text.assemble(("\nserved acceptance of ", "title"), (result.speculator, "name")),
        Text(where, style="note"),
    ]
    if wide:
        parts += [Uncut(_acceptance_table(result.settings)), Text(), Uncut(_pace_table(result.settings))]
    else:
        parts.append(_narrow_table(result.settings))
    for setting in result.settings:
        place = f"{setting.suite}, K={setting.num_speculative_tokens}, T={setting.temperature:g}"
        if setting.acceptance.undrafted:
            parts.append(Text(f"{place}: {setting.acceptance.undrafted:.0f} rounds without a draft", style="note"))
        if setting.pace.repeated:
            parts.append(Text(f"{place}: {setting.pace.repeated} requests were sent again", style="warn"))
        if setting.unmatched_baseline and setting.speed_up is not None:
            parts.append(Text(f"{place}: {unreliable(setting.speed_up)}", style="warn"))
    lines = dict.fromkeys(setting.definition for setting in result.settings)
    parts.append(Text("\n" + "\n".join(lines), style="note"))
    return Group(*parts)


def ledger_table(ledger: Ledger) -> RenderableType:
    """Renders the ledger of a run, its alarms, and the definition of every number."""
    table = _table(("suite", "K", "T", "kind", "source", "prompts", "tau", "95%", "expected", "within", ""))
    for line in ledger.lines:
        place = (escape(line.suite), str(line.num_speculative_tokens), f"{line.temperature:g}")
        for index, entry in enumerate(line.entries):
            table.add_row(*(place if index == 0 else ("", "", "")), *_entry_cells(entry))
    parts: list[RenderableType] = [Text.assemble(("\nledger of ", "title"), (ledger.run, "name")), table]
    parts += [Text(f"ALARM {alarm}", style="bad") for alarm in ledger.alarms]
    if ledger.alarms:
        parts.append(Text(f"find the cause with: {ledger.doctor}", style="bad"))
    parts += [Text(reason, style="warn") for reason in ledger.unread]
    entries = [(line.place, entry) for line in ledger.lines for entry in line.entries]
    notes = dict.fromkeys(f"{place}, {entry.kind}: {entry.note}" for place, entry in entries if entry.note)
    parts += [Text(note, style="note") for note in notes]
    definitions = dict.fromkeys(f"{entry.kind}: {entry.definition}" for _, entry in entries)
    parts.append(Text("\n" + "\n".join(definitions), style="note"))
    return Group(*parts)


def _entry_cells(entry: LedgerEntry) -> tuple[str, ...]:
    compared = entry.expected is not None
    mark = "" if not compared else "[bad]ALARM[/]" if entry.gap else "[good]agrees[/]"
    return (
        entry.kind,
        escape(entry.source),
        "-" if entry.prompts is None else str(entry.prompts),
        number_text(entry.tau, 3),
        _range(entry.interval),
        number_text(entry.expected, 3),
        _range(entry.tolerance) if entry.tolerance or not compared else "every round",
        mark,
    )


def _narrow_table(settings: Sequence[ServedSetting]) -> Table:
    table = _table(("suite", "K", "T", "tau (95%)", "tokens/s", "plain", "speed-up"))
    for setting in settings:
        acceptance, baseline = setting.acceptance, setting.baseline
        interval = f" ({_range(acceptance.tau_interval)})" if acceptance.tau_interval else ""
        gain = "" if setting.speed_up is None else f"{setting.speed_up:.2f}x"
        table.add_row(
            *_place_cells(setting),
            number_text(acceptance.tau, 3) + interval,
            f"{setting.pace.tokens_per_second:.1f}",
            "" if baseline is None else f"{baseline.tokens_per_second:.1f}",
            f"[warn]{gain}?[/]" if setting.unmatched_baseline else gain,
        )
    return table


def _acceptance_table(settings: Sequence[ServedSetting]) -> Table:
    table = _table(("suite", "K", "T", "prompts", "rounds", "tau", "95%", "accepted by position", "drafted"))
    for setting in settings:
        acceptance = setting.acceptance
        table.add_row(
            *_place_cells(setting),
            str(acceptance.prompts),
            f"{acceptance.rounds:.0f}",
            number_text(acceptance.tau, 3),
            _range(acceptance.tau_interval),
            rates_text(acceptance.by_position) or "-",
            number_text(acceptance.drafted, 2),
        )
    return table


def _pace_table(settings: Sequence[ServedSetting]) -> Table:
    columns = ("suite", "K", "T", "server", "tokens/s", "first token ms", "p50", "p95", "inter-token ms", "p50", "p95")
    table = _table((*columns, "speed-up"))
    for setting in settings:
        for server, pace in (("drafts", setting.pace), ("plain", setting.baseline)):
            if pace is None:
                continue
            gain = "" if server == "plain" or setting.speed_up is None else f"{setting.speed_up:.2f}x"
            spreads = (*_spread(pace.first_token), *_spread(pace.inter_token))
            table.add_row(*_place_cells(setting), server, f"{pace.tokens_per_second:.1f}", *spreads, gain)
    return table


def _spread(spread: Spread | None) -> tuple[str, str, str]:
    """Formats mean, median and 95th percentile in milliseconds."""
    if spread is None:
        return "-", "-", "-"
    return f"{1e3 * spread.mean:.1f}", f"{1e3 * spread.p50:.1f}", f"{1e3 * spread.p95:.1f}"


def _place_cells(setting: ServedSetting) -> tuple[str, str, str]:
    return escape(setting.suite), str(setting.num_speculative_tokens), f"{setting.temperature:g}"


def _range(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{number_text(interval[0], 2)} to {number_text(interval[1], 2)}"


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None)
    for name in columns:
        left = name in _LEFT
        # Names may be long; numbers are never broken.
        table.add_column(name, justify="left" if left else "right", header_style="title", no_wrap=not left)
    return table
