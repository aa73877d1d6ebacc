"""The table of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.markup import escape
from rich.table import Table

from speculators.files.disk import size_text
from speculators.report.recipe import plain_table
from speculators.runs.cache import CacheEntry


def cache_table(entries: Sequence[CacheEntry]) -> Table:
    """Renders one line per entry: name, size, last use, and the recipes and models that it serves."""
    table = plain_table("entry", "size", "last used", "for")
    table.columns[0].no_wrap = True
    table.columns[1].justify = "right"
    for entry in entries:
        when = "now" if entry.in_use else f"{datetime.fromtimestamp(entry.last_used):%Y-%m-%d}"
        table.add_row(escape(entry.name), size_text(entry.bytes), when, escape(", ".join(entry.users) or "unknown"))
    return table
