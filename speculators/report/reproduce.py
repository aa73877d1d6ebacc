"""What a re-run showed, for people: the environment, then a line for each check of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.report.recipe import plain_table

_STYLES = {"same": "good", "within tolerance": "good", "differs": "bad", "not known": "warn"}


def reproduction_tables(result: Mapping[str, Any]) -> RenderableType:
    """Returns the tables of a reproduction, given as its JSON values."""
    parts: list[RenderableType] = []
    if result["environment"]:
        table = plain_table("environment", "lock", "here", "")
        for each in result["environment"]:
            style, words = ("warn", "can matter") if each["matters"] else ("note", "cannot matter")
            why = f"[{style}]{words}[/]: {escape(each['why'])}"
            if each["key"] == "threads":
                why += f"; the re-run was given {each['locked']}"
            table.add_row(escape(each["key"]), *(escape(_short(each[side])) for side in ("locked", "here")), why)
        parts += [table, Text()]
    parts += [Text.assemble(("held to ", "title"), result["promise"]), Text()]
    table = plain_table("stage", "check", "result", "evidence")
    for found in result["findings"]:
        outcome = f"[{_STYLES[found['result']]}]{found['result']}[/]"
        table.add_row(found["stage"], escape(found["check"]), outcome, escape(found["evidence"]))
    return Group(*parts, table, Text(), _verdict(result))


def _short(value: Any) -> str:
    """Returns a value as text, of a hash as much as tells it from another."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) in (40, 64) and set(text) <= set("0123456789abcdef") else text


def _verdict(result: Mapping[str, Any]) -> Text:
    if result["verdict"] == "not fully verified":
        lacking = ", ".join(result["unverified"])
        return Text.assemble((result["verdict"], "warn"), f": {lacking}; nothing that could be compared differs")
    if (first := result["first"]) is None:
        near = any(found["result"] == "within tolerance" for found in result["findings"])
        how = "within the tolerance" if near else "to the same bits"
        return Text.assemble(("reproduced", "good"), f" {how}: {result['run']}, again in {result['to']}")
    place = f"stage {first['stage']}" + ("" if first["step"] is None else f", update {first['step']}")
    what = f", {first['what']}" if first["what"] else ""
    by = "" if first["by"] is None else f", by {first['by']:.3g}"
    return Text.assemble(("not reproduced", "bad"), f": the first difference is in {place}{what}{by}")
