"""Tables of a benchmark on a running server, and of a run's ledger, rendered from their JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.report.bench import number_text, rates_text

Values = Mapping[str, Any]


def served_tables(result: Values) -> RenderableType:
    """Returns acceptance, pace and definitions of a benchmark of a server."""
    where = f"  ({result['engine']} {result['version']}, {result['model']} at {result['endpoint']}, "
    where += f"{result['concurrency']} at once)"
    parts: list[RenderableType] = [
        Text.assemble(("\nserved acceptance of ", "title"), (result["speculator"], "name"), (where, "note")),
        _acceptance_table(result["settings"]),
        Text(),
        _pace_table(result["settings"]),
    ]
    for setting in result["settings"]:
        acceptance, place = setting["acceptance"], _place(setting)
        if acceptance["undrafted"]:
            parts.append(Text(f"{place}: {acceptance['undrafted']:.0f} rounds without a draft", style="note"))
        if setting["pace"]["repeated"]:
            parts.append(Text(f"{place}: {setting['pace']['repeated']} requests were sent again", style="warn"))
        if setting["unmatched_baseline"]:
            parts.append(Text(f"{place}: the speed-up exceeds tau: the baseline is not matched", style="bad"))
    lines = dict.fromkeys(setting["definition"] for setting in result["settings"])
    parts.append(Text("\n" + "\n".join(lines), style="note"))
    return Group(*parts)


def ledger_table(values: Values) -> RenderableType:
    """Returns the ledger of a run, its alarms, and the definition of every number."""
    table = _table(("suite", "K", "T", "is", "from", "prompts", "tau", "95%", "expected", "within", ""))
    for line in values["lines"]:
        for index, entry in enumerate(line["entries"]):
            place = (line["suite"], str(line["num_speculative_tokens"]), f"{line['temperature']:g}")
            table.add_row(*(map(escape, place) if index == 0 else ("", "", "")), *_entry(entry))
    parts: list[RenderableType] = [Text.assemble(("\nledger of ", "title"), (values["run"], "name")), table]
    parts += [Text(f"ALARM {words}", style="bad") for words in values["alarms"]]
    if values["alarms"]:
        parts.append(Text(f"find the cause with: {values['doctor']}", style="bad"))
    parts += [Text(words, style="warn") for words in values["unread"]]
    notes = [
        f"{_place(line)}, {entry['kind']}: {entry['note']}"
        for line in values["lines"]
        for entry in line["entries"]
        if entry["note"]
    ]
    parts += [Text(words, style="note") for words in dict.fromkeys(notes)]
    told = dict.fromkeys(f"{e['kind']}: {e['definition']}" for line in values["lines"] for e in line["entries"])
    parts.append(Text("\n" + "\n".join(told), style="note"))
    return Group(*parts)


def _entry(entry: Values) -> tuple[str, ...]:
    compared = entry["expected"] is not None
    mark = "" if not compared else "[bad]ALARM[/]" if entry["gap"] else "[good]agrees[/]"
    within = _range(entry["tolerance"]) if entry["tolerance"] or not compared else "every round"
    return (
        entry["kind"],
        escape(entry["source"]),
        "-" if entry["prompts"] is None else str(entry["prompts"]),
        number_text(entry["tau"], 3),
        _range(entry["interval"]),
        number_text(entry["expected"], 3),
        within,
        mark,
    )


def _acceptance_table(settings: Sequence[Values]) -> Table:
    names = ("suite", "K", "T", "prompts", "rounds", "tau", "95%", "accepted by position", "drafted")
    table = _table(names)
    for setting in settings:
        held = setting["acceptance"]
        table.add_row(
            *_cells(setting),
            str(held["prompts"]),
            f"{held['rounds']:.0f}",
            number_text(held["tau"], 3),
            _range(held["tau_interval"]),
            rates_text(held["by_position"]) or "-",
            number_text(held["drafted"], 2),
        )
    return table


def _pace_table(settings: Sequence[Values]) -> Table:
    names = ("suite", "K", "T", "server", "tokens/s", "first token ms", "p50", "p95", "inter-token ms", "p50", "p95")
    table = _table((*names, "speed-up"))
    for setting in settings:
        for name in ("pace", "baseline"):
            held = setting[name]
            if held is None:
                continue
            gain = "" if name == "baseline" or setting["speed_up"] is None else f"{setting['speed_up']:.2f}x"
            table.add_row(
                *_cells(setting),
                "drafts" if name == "pace" else "plain",
                f"{held['tokens_per_second']:.1f}",
                *_spread(held["first_token"]),
                *_spread(held["inter_token"]),
                gain,
            )
    return table


def _spread(values: Values | None) -> tuple[str, ...]:
    if values is None:
        return "-", "-", "-"
    return tuple(f"{1e3 * values[key]:.1f}" for key in ("mean", "p50", "p95"))


def _cells(setting: Values) -> tuple[str, str, str]:
    return escape(setting["suite"]), str(setting["num_speculative_tokens"]), f"{setting['temperature']:g}"


def _place(setting: Values) -> str:
    return ", ".join(("{}", "K={}", "T={}")).format(*_cells(setting))


def _range(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None)
    for name in columns:
        left = name in ("suite", "is", "from", "server")
        table.add_column(name, justify="left" if left else "right", header_style="title")
    return table
