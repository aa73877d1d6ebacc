"""The comparison of captured states for people: one line a layer, then what is wrong."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.report.recipe import plain_table
from speculators.verifier.states_check import StatesCheck


def states_table(found: StatesCheck) -> RenderableType:
    """Returns the errors by layer with their definition, and the verdict."""
    table = plain_table("layer", "error", "nearest layer", "its error", "")
    for layer in found.layers:
        words = layer.words(found.tolerance)
        verdict = f"[bad]{escape(words)}[/]" if words else "[good]the verifier's own[/]"
        table.add_row(str(layer.layer), f"{layer.error:.2e}", str(layer.nearest), f"{layer.nearest_error:.2e}", verdict)
    title = f"states of {found.conversations} conversations, {found.tokens:,} tokens, from {found.source}"
    meaning = (
        f"error: mean over tokens of |captured - in process| / |in process|, captured in {found.states_dtype}, "
        f"in process in {found.dtype}; up to {found.tolerance:g} is rounding"
    )
    parts: list[RenderableType] = [Text(title, style="title"), table, Text(meaning, style="note")]
    if found.problems:
        parts.append(Text(f"do: {found.advice}"))
    return Group(*parts)
