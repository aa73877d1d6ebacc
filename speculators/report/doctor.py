"""What the doctor found, for people: one table, then what is wrong, once more, with what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.report.progress import duration
from speculators.report.recipe import plain_table

STYLES = {"ok": "good", "warning": "warn", "wrong": "bad", "not checked": "note"}


def diagnosis_tables(result: Mapping[str, Any]) -> RenderableType:
    """Returns the table of a diagnosis, given as its JSON values, and the verdict."""
    where = f"  ({result['algorithm'] or 'unknown'}; verifier {result['verifier'] or 'not looked at'})"
    head = Text.assemble(("\nexamined ", "title"), (result["speculator"], "name"), (where, "note"))
    return Group(head, Text(), _table(result["checks"]), Text(), *_verdict(result))


def _table(checks: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("check", "result", "evidence", "what to do")
    table.columns[1].no_wrap = True
    table.columns[0].no_wrap = True
    for column, ratio in zip(table.columns[2:], (3, 2), strict=True):
        column.ratio = ratio
    family = ""
    for check in checks:
        if check["family"] != family:
            family = check["family"]
            table.add_row(Text(family, style="title"))
        result = Text(check["result"], style=STYLES[check["result"]])
        table.add_row(f"  {escape(check['name'])}", result, escape(check["evidence"]), escape(check["todo"]))
    return table


def _verdict(result: Mapping[str, Any]) -> list[Text]:
    counts = {kind: sum(check["result"] == kind for check in result["checks"]) for kind in STYLES}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    word = ("healthy", "good") if result["healthy"] else ("not healthy", "bad")
    basis = f"measured on {result['prompts']}; " if result["prompts"] else ""
    chance = f"chance alone makes a sound speculator wrong with a probability of {result['false_alarm']:g} at most"
    lines = [Text.assemble(word, f": {told}, in {duration(result['seconds'])}"), Text(f"{basis}{chance}", style="note")]
    for check in result["checks"]:
        if check["result"] == "wrong":
            lines.append(Text.assemble(("wrong ", "bad"), (f"{check['family']}/{check['name']}", "name"), ": "))
            lines[-1].append(check["evidence"])
            lines.append(Text(f"  do: {check['todo']}"))
    return lines
