"""Renders what `spec data` measured: conversations with their mask, numbers, findings. Readable without colour too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from speculators.inspection.kinds import EARLIER_REASONING, REASONING
from speculators.inspection.view import DataFinding, DataView, Leakage, OnPolicy, RenderedConversation, Rows, Vocabulary
from speculators.report.recipe import plain_table

BAR = 40
# Brackets around supervised text: colour is lost in a pipe, in a file and to some eyes.
OPEN, CLOSE = "⟦", "⟧"
LEVELS = {"error": "bad", "warning": "warn", "note": "note"}
# Control characters in data, which a terminal would obey, become their pictures. Newline and tab stay.
PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: "␡", **dict.fromkeys(range(0x80, 0xA0), "�")}


def data_tables(view: DataView) -> RenderableType:
    """Lays out conversations, numbers, lengths and findings; what asks for action comes last."""
    parts: list[RenderableType] = []
    for conversation in view.shown:
        parts += [_heading(conversation, prompt=view.waiting is not None), conversation_text(conversation), Text()]
    parts.append(_numbers(view))
    if view.rows is not None:
        parts += [Text(), _lengths(view.rows)]
    parts += [Text(), _findings(view.findings)]
    return Group(*parts)


def conversation_text(conversation: RenderedConversation) -> Text:
    """Renders a conversation: supervised text in brackets and underlined, special tokens by their names."""
    text, inside = Text(), False
    for piece in conversation.pieces:
        if piece.supervised != inside:
            text.append(CLOSE if inside else OPEN, style="mask")
            inside = piece.supervised
        kind = "special" if piece.special else piece.kind
        style = f"supervised {kind}".rstrip() if piece.supervised else kind
        text.append(visible(piece.text), style=style)
    return text.append(CLOSE, style="mask") if inside else text


def visible(text: str) -> str:
    """Replaces control characters by their pictures."""
    return text.translate(PICTURES)


def _heading(conversation: RenderedConversation, *, prompt: bool) -> Text:
    kind = "prompt" if prompt else "conversation"
    mask = "" if prompt else f", {conversation.supervised:,} supervised: {OPEN}these{CLOSE}"
    cut = "; cut at data.max_tokens" if conversation.cut else ""
    shown = dict.fromkeys(piece.kind for piece in conversation.pieces if piece.kind)
    legend = [part for kind in shown for part in ((", ", ""), (kind, kind))]
    size = f"  {conversation.tokens:,} tokens{mask}{cut}"
    return Text.assemble((f"{kind} ", "title"), (visible(conversation.id), "name"), (size, "note"), *legend)


def _numbers(view: DataView) -> Table:
    table = plain_table()
    table.add_column(style="name", no_wrap=True)
    table.add_column(overflow="fold")
    lines = {"recipe": view.recipe, "sources": _sources(view.sources)}
    if view.waiting is not None:
        lines["answers"] = f"none is generated yet, for {view.waiting:,} prompts"
    if view.rows is not None:
        lines |= _row_lines(view.rows)
    lines["mask from"] = (
        "the chat template's own generation markers" if view.marked else "comparing renderings of the chat template"
    )
    if view.thinks is not None or view.thinking_share:
        lines["reasoning"] = _reasoning(view)
    if others := {kind: count for kind, count in view.kinds.items() if kind not in (REASONING, EARLIER_REASONING)}:
        lines["with"] = ", ".join(f"{kind}: {count:,}" for kind, count in others.items())
    if view.dropped:
        lines["not shown"] = f"by the chat template: {', '.join(view.dropped)}"
    if view.vocabulary is not None:
        lines |= _vocabulary_lines(view.vocabulary)
    lines["held out"] = _leakage(view.leakage)
    if view.on_policy is not None:
        lines["on-policy"] = _policy(view.on_policy)
        # The consequence of foreign answers is a finding, further below.
        lines |= {} if view.on_policy.verdict == "foreign" else {"which means": view.on_policy.consequence}
    for name, text in lines.items():
        table.add_row(name, Text(visible(text)))
    return table


def _sources(sources: Mapping[str, int]) -> str:
    return "\n".join(f"{path}, {count:,} rows" for path, count in sources.items()) or "no rows"


def _row_lines(rows: Rows) -> dict[str, str]:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rows.skipped.items())
    left = (
        f"{sum(rows.skipped.values()):,} of {rows.read:,} rows: {reasons}" if reasons else f"none of {rows.read:,} rows"
    )
    return {
        "prepared": f"{rows.conversations:,} conversations, {rows.tokens:,} tokens, in {rows.folder}",
        "supervised": f"{rows.supervised:,} tokens, {rows.supervised_share:.1%}",
        "left out": left,
        "truncated": f"{rows.truncated:,} conversations at {rows.max_tokens:,} tokens",
    }


def _reasoning(view: DataView) -> str:
    default = {None: "the chat template has no switch for it", True: "asked for by default", False: "off by default"}
    return f"{default[view.thinks]}; {view.thinking_share:.0%} of the conversations have reasoning"


def _vocabulary_lines(vocabulary: Vocabulary) -> dict[str, str]:
    whole = vocabulary.size == vocabulary.of
    size = "the whole vocabulary" if whole else f"{vocabulary.size:,} of {vocabulary.of:,} tokens"
    most = ", ".join(f"{tau:.2f} for K = {k}" for k, tau in vocabulary.most.items())
    new = f", about {vocabulary.unseen:.1%} of new text; without any other error, tau would reach about {most}"
    ends = ", ".join(f"{token} {count:,} times" for token, count in vocabulary.ends.items())
    missing = ", ".join(f"{token} {count:,} times" for token, count in vocabulary.missing.items())
    return {
        "can be drafted": f"{size}: {vocabulary.coverage:.1%} of the supervised tokens{'' if whole else new}",
        "ends": f"{ends}; all can be drafted",
        "special tokens": f"supervised, but cannot be drafted: {missing}" if missing else "none is missing",
    }


def _leakage(leakage: Leakage) -> str:
    if not leakage.suites:
        return "nothing: the recipe names no suite"
    lines = []
    for suite, overlap in leakage.suites.items():
        seen = f"{overlap.same:,} training prompts equal one of them" if overlap.same else "none is trained on"
        near = f"{overlap.near:,} training prompts are near-duplicates"
        share = f"the nearest shares {overlap.largest:.0%} of its 5-grams; near is {leakage.limit:.0%}"
        lines.append(f"{overlap.prompts:,} prompts of {suite}: {seen}; {near} ({share})")
    return "\n".join(lines)


def _policy(policy: OnPolicy) -> str:
    ends = "" if policy.ends_agreement is None else f", at {policy.ends_agreement:.0%} of {policy.ends} ends of turns"
    return (
        f"the verifier's greedy token is the data's at {policy.agreement:.1%} of {policy.tokens:,} places{ends}\n"
        f"mean log-probability {policy.log_probability:.3f} (perplexity {policy.perplexity:.2f}), "
        f"of its own samples {-policy.entropy:.3f}\n"
        f"in {policy.dtype}, {len(policy.conversations)} conversations, teacher-forced"
    )


def _lengths(rows: Rows) -> RenderableType:
    shortest, low, median, high, longest = rows.quartiles
    title = f"{shortest:,} to {longest:,} tokens per conversation, half of them {low:,} to {high:,}, median {median:,}"
    table = plain_table()
    table.add_column(justify="right")
    table.add_column()
    largest = max(part.count for part in rows.histogram)
    for part in rows.histogram:
        bar = "█" * -(-BAR * part.count // largest)
        table.add_row(f"{part.low:,} to {part.high:,}", f"{bar} {part.count:,}".strip())
    return Group(Text(title), table)


def _findings(findings: Sequence[DataFinding]) -> RenderableType:
    if not findings:
        return Text("no findings", style="good")
    return Group(*(part for finding in findings for part in _finding(finding)))


def _finding(finding: DataFinding) -> Iterator[RenderableType]:
    style = LEVELS[finding.level]
    yield Text.assemble((finding.level, style), (f" {finding.rule}: ", "title"), visible(finding.message))
    lines = [f"e.g. {visible(example)}" for example in finding.examples]
    lines += [f"do: {finding.todo}"] if finding.todo else []
    for line in lines:
        yield Padding(Text(line), (0, 0, 0, 4), expand=False)
