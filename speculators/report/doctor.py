"""Renders a diagnosis for 80 columns: what is wrong and what to do first, then what passed, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from speculators.doctor.check import FAMILIES, OK, SKIPPED, WARNING, WRONG, Check, Diagnosis, listed
from speculators.report.progress import duration

STYLES = {WRONG: "bad", WARNING: "warn", OK: "good", SKIPPED: "note"}
# A reason that so many checks share is given; the others only in the long report.
SHARED = 3


def diagnosis_tables(diagnosis: Diagnosis, *, long: bool = False) -> RenderableType:
    """Renders findings, checks and the verdict; `long` gives the evidence of every check."""
    where = f"  ({diagnosis.algorithm or 'unknown'}; verifier {diagnosis.verifier or 'not loaded'})"
    head = Text.assemble(("\nexamined ", "title"), (diagnosis.speculator, "name"), (where, "note"))
    return Group(head, Text(), _table(diagnosis.checks, long), Text(), *_verdict(diagnosis))


def _table(checks: Sequence[Check], long: bool) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for result in (WRONG, WARNING):
        for check in checks:
            if check.result == result:
                _add(table, result, _finding(check))
    passed = _each(checks, OK) if long else _passed(checks)
    for result, rows in ((OK, passed), (SKIPPED, _each(checks, SKIPPED) if long else _skipped(checks))):
        for index, row in enumerate(rows):
            _add(table, "" if index else result, row)
    return table


def _add(table: Table, result: str, row: Text) -> None:
    table.add_row(Text(result, style=STYLES.get(result, "")), row)


def _finding(check: Check) -> Text:
    text = Text.assemble((f"{check.family}/{check.name}", "name"), f": {check.evidence}")
    return text.append(f"\ndo: {check.todo}", style="title") if check.todo else text


def _each(checks: Sequence[Check], result: str) -> Iterator[Text]:
    for check in checks:
        if check.result == result:
            yield Text.assemble((f"{check.family}/{check.name}", "name"), f": {check.evidence}")


def _passed(checks: Sequence[Check]) -> Iterator[Text]:
    """Lists the names of the checks that passed, one line per family, and the figures of the acceptance."""
    for family in FAMILIES:
        names = [check.name for check in checks if check.family == family and check.result == OK]
        if names:
            yield Text.assemble((family, "name"), f": {', '.join(names)}")


def _skipped(checks: Sequence[Check]) -> Iterator[Text]:
    """Lists what was not checked by reason; reasons of single checks are left to the long report."""
    reasons: dict[str, list[str]] = {}
    for check in checks:
        if check.result == SKIPPED:
            reasons.setdefault(check.evidence, []).append(check.name)
    for reason, names in reasons.items():
        if len(names) >= SHARED:
            yield Text(f"{len(names)} checks: {reason}", style="note")
    alone = [name for names in reasons.values() if len(names) < SHARED for name in names]
    if alone:
        yield Text(f"{listed(alone)} (--long gives the reasons)", style="note")


def _verdict(diagnosis: Diagnosis) -> list[Text]:
    counts = {kind: sum(check.result == kind for check in diagnosis.checks) for kind in STYLES}
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    style = "good" if diagnosis.healthy else "bad" if diagnosis.failed else "warn"
    basis = f"measured on {diagnosis.prompts}; " if diagnosis.prompts else ""
    chance = f"a sound speculator fails by chance with a probability of at most {diagnosis.false_alarm:g}"
    return [
        Text.assemble((diagnosis.verdict, style), f": {summary}, in {duration(diagnosis.seconds)}"),
        Text(f"{basis}{chance}", style="note"),
    ]
