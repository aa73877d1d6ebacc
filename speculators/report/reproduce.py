"""Renders a reproduction: the environment, then one line for each check of each stage, then the verdict."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.report.recipe import plain_table
from speculators.reproduce.findings import DIFFERS, SAME, UNKNOWN, WITHIN
from speculators.reproduce.result import Reproduction

_STYLES = {SAME: "good", WITHIN: "good", DIFFERS: "bad", UNKNOWN: "warn"}


def reproduction_tables(result: Reproduction) -> RenderableType:
    """Lays out what differs from the lock's environment, what each check showed, and the verdict."""
    parts: list[RenderableType] = []
    if result.environment:
        table = plain_table("environment", "lock", "here", "")
        for difference in result.environment:
            style, effect = ("warn", "can matter") if difference.matters else ("note", "cannot matter")
            why = f"[{style}]{effect}[/]: {escape(difference.why)}"
            if difference.key == "threads":
                why += f"; the re-run used {difference.locked}"
            values = (escape(_short(value)) for value in (difference.locked, difference.current))
            table.add_row(escape(difference.key), *values, why)
        parts += [table, Text()]
    parts += [Text.assemble(("held to ", "title"), result.promise), Text()]
    table = plain_table("stage", "check", "result", "evidence")
    for finding in result.findings:
        outcome = f"[{_STYLES[finding.result]}]{finding.result}[/]"
        table.add_row(finding.stage, escape(finding.check), outcome, escape(finding.evidence))
    return Group(*parts, table, Text(), _verdict(result))


def _short(value: object) -> str:
    """Shortens a commit or sha256 to the digits that identify it."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) in (40, 64) and set(text) <= set("0123456789abcdef") else text


def _verdict(result: Reproduction) -> Text:
    if result.verdict == "not fully verified":
        lacking = ", ".join(result.unverified)
        return Text.assemble((result.verdict, "warn"), f": {lacking}; nothing that could be compared differs")
    if (first := result.first) is None:
        near = any(finding.result == WITHIN for finding in result.findings)
        how = "within the tolerance" if near else "to the same bits"
        return Text.assemble(("reproduced", "good"), f" {how}: {result.run}, again in {result.to}")
    place = f"stage {first.stage}" + ("" if first.step is None else f", update {first.step}")
    what = f", {first.what}" if first.what else ""
    by = "" if first.by is None else f", by {first.by:.3g}"
    return Text.assemble(("not reproduced", "bad"), f": the first difference is in {place}{what}{by}")
