"""Renders a diagnosis: one table of all checks, then each fault again with its remedy."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.doctor.check import Check, Diagnosis
from speculators.report.progress import duration
from speculators.report.recipe import plain_table

STYLES = {"ok": "good", "warning": "warn", "wrong": "bad", "not checked": "note"}


def diagnosis_tables(diagnosis: Diagnosis) -> RenderableType:
    """Renders the table of checks and the verdict."""
    where = f"  ({diagnosis.algorithm or 'unknown'}; verifier {diagnosis.verifier or 'not loaded'})"
    head = Text.assemble(("\nexamined ", "title"), (diagnosis.speculator, "name"), (where, "note"))
    return Group(head, Text(), _table(diagnosis.checks), Text(), *_verdict(diagnosis))


def _table(checks: Sequence[Check]) -> Table:
    table = plain_table("check", "result", "evidence", "what to do")
    table.columns[1].no_wrap = True
    table.columns[0].no_wrap = True
    for column, ratio in zip(table.columns[2:], (3, 2), strict=True):
        column.ratio = ratio
    family = ""
    for check in checks:
        if check.family != family:
            family = check.family
            table.add_row(Text(family, style="title"))
        result = Text(check.result, style=STYLES[check.result])
        table.add_row(f"  {escape(check.name)}", result, escape(check.evidence), escape(check.todo))
    return table


def _verdict(diagnosis: Diagnosis) -> list[Text]:
    counts = {kind: sum(check.result == kind for check in diagnosis.checks) for kind in STYLES}
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    word = ("healthy", "good") if diagnosis.healthy else ("not healthy", "bad")
    basis = f"measured on {diagnosis.prompts}; " if diagnosis.prompts else ""
    chance = f"a sound speculator fails by chance with a probability of at most {diagnosis.false_alarm:g}"
    lines = [
        Text.assemble(word, f": {summary}, in {duration(diagnosis.seconds)}"),
        Text(f"{basis}{chance}", style="note"),
    ]
    for check in diagnosis.checks:
        if check.result == "wrong":
            lines.append(Text.assemble(("wrong ", "bad"), (f"{check.family}/{check.name}", "name"), ": "))
            lines[-1].append(check.evidence)
            lines.append(Text(f"  do: {check.todo}"))
    return lines
