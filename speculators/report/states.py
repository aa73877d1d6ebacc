"""Renders the comparison of captured states: one line per layer, then what is wrong."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.report.recipe import plain_table
from speculators.verifier.states_check import StatesCheck


def states_table(check: StatesCheck) -> RenderableType:
    """Lays out the error of each layer, its definition, and advice where a layer is wrong."""
    table = plain_table("layer", "error", "nearest layer", "its error", "")
    for layer in check.layers:
        problem = layer.problem(check.tolerance)
        verdict = f"[bad]{escape(problem)}[/]" if problem else "[good]the verifier's own[/]"
        table.add_row(str(layer.layer), f"{layer.error:.2e}", str(layer.nearest), f"{layer.nearest_error:.2e}", verdict)
    title = f"states of {check.conversations} conversations, {check.tokens:,} tokens, from {check.source}"
    definition = (
        f"error: mean over tokens of |captured - in process| / |in process|, captured in {check.states_dtype}, "
        f"in process in {check.dtype}; up to {check.tolerance:g} is rounding"
    )
    parts: list[RenderableType] = [Text(title, style="title"), table, Text(definition, style="note")]
    if check.problems:
        parts.append(Text(f"do: {check.advice}"))
    return Group(*parts)
