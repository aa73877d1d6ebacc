"""The tables of an audit of a server, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.report.bench import number_text
from speculators.servers.audit import AuditedRound, AuditResult

# Differing rounds that are printed; --json has all.
MOST_ROUNDS = 8
# Explanations that are printed, where none explains the server.
MOST_TRIED = 2


def audit_tables(result: AuditResult) -> RenderableType:
    """Renders the verdict, the first differing rounds, what they have in common, and what would explain them."""
    where = f"{result.engine} {result.version}, {result.model} at {result.endpoint}, concurrency {result.concurrency}"
    parts: list[RenderableType] = [
        Text.assemble(("\naudit of ", "title"), (result.speculator, "name")),
        Text(where, style="note"),
        _counts(result),
        _verdict(result),
    ]
    if result.differing:
        parts += [Text(), _rounds(result.differing[:MOST_ROUNDS])]
        if len(result.differing) > MOST_ROUNDS:
            parts.append(Text(f"... {len(result.differing) - MOST_ROUNDS} more; --json lists all", style="note"))
        parts.append(Text())
    for pattern in result.patterns:
        parts.append(Text(pattern.what, style="warn"))
        if pattern.check:
            parts.append(Text(f"  check {pattern.check}"))
    parts += _explanations(result)
    parts.append(Text(f"\n{_definition(result)}", style="note"))
    return Group(*parts)


def _counts(result: AuditResult) -> Table:
    table = Table(box=None)
    for name in ("K", "answers", "tokens", "rounds", "agree", "near ties", "differ", "tau", "predicted"):
        table.add_column(name, justify="right", header_style="title", no_wrap=True)
    table.add_row(
        str(result.num_speculative_tokens),
        str(result.tally.answers),
        str(result.tally.tokens),
        str(result.tally.rounds),
        str(result.tally.agreeing),
        str(result.tally.near_ties),
        f"[bad]{len(result.differing)}[/]" if result.differing else "0",
        number_text(result.tally.served_tau, 3),
        number_text(result.tally.predicted_tau, 3),
    )
    return table


def _verdict(result: AuditResult) -> Text:
    if result.passes:
        return Text("the server drafts with this speculator: every round is as predicted", style="good")
    lines = []
    if not result.tally.rounds:
        lines.append("the server made no round: there is nothing to compare")
    if result.tally.foreign_tokens:
        tokens = f"{result.tally.foreign_tokens} of {result.tally.tokens} tokens are not this verifier's choice"
        lines.append(f"{tokens}: the server verifies with another model, or another precision")
    if result.differing:
        first = result.differing[0]
        place = f"prompt {first.prompt}, turn {first.turn + 1}, round {first.number + 1}, depth {first.depth}"
        lines.append(f"{len(result.differing)} of {result.tally.rounds} rounds differ, first {place}")
    return Text("\n".join(lines), style="bad")


def _rounds(rounds: Sequence[AuditedRound]) -> Table:
    table = Table(box=None)
    columns = ("prompt", "turn", "round", "position", "predicted", "served", "depth", "draft gap", "verifier gap")
    for name in columns:
        left = name == "prompt"
        table.add_column(name, justify="left" if left else "right", header_style="title", no_wrap=not left)
    for each in rounds:
        table.add_row(
            escape(each.prompt),
            str(each.turn + 1),
            str(each.number + 1),
            str(each.position),
            str(each.predicted),
            str(each.served),
            str(each.depth),
            "none" if each.draft_gap is None else f"{each.draft_gap:.3g}",
            "-" if each.verifier_gap is None else f"{each.verifier_gap:.3g}",
        )
    return table


def _explanations(result: AuditResult) -> list[RenderableType]:
    parts: list[RenderableType] = []
    explaining = [each for each in result.explanations if each.explains]
    for each in explaining:
        parts.append(Text(f"{each.what}: that predicts {each.agreeing} of {result.tally.rounds} rounds", style="bad"))
        parts.append(Text(f"  {each.todo}"))
    if result.explanations and not explaining:
        parts.append(Text("none of what servers often mistake predicts its rounds; the closest:", style="note"))
        for each in result.explanations[:MOST_TRIED]:
            parts.append(Text(f"  {each.what}: {each.agreeing} of {result.tally.rounds}", style="note"))
    return parts


def _definition(result: AuditResult) -> str:
    return (
        f"rounds: {result.source}; predicted by replay of the server's own tokens, K={result.num_speculative_tokens}, "
        f"T=0, in {result.dtype}; near tie: a gap of at most {result.near_tie}; gap: between the logit of the choice "
        "and the nearest that would explain what was served"
    )
