"""The data for people: conversations with their mask on them, numbers, findings. Readable without colour, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from speculators.inspection.view import DataView, Finding, Leakage, OnPolicy, Rows, Shown, Vocabulary
from speculators.report.recipe import plain_table

BAR = 40
# Around what is supervised: the colour is gone in a pipe, in a file and to some eyes.
OPEN, CLOSE = "⟦", "⟧"
LEVELS = {"error": "bad", "warning": "warn", "note": "note"}
# Data may hold control characters, which a terminal would obey: shown as their pictures. Newline and tab stay.
PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: "␡", **dict.fromkeys(range(0x80, 0xA0), "�")}


def data_tables(view: DataView) -> RenderableType:
    """Returns conversations, numbers, lengths and findings, in this order: what asks for action stands last."""
    parts: list[RenderableType] = []
    for shown in view.shown:
        parts += [_heading(shown, prompt=view.waiting is not None), conversation_text(shown), Text()]
    parts.append(_numbers(view))
    if view.rows is not None:
        parts += [Text(), _lengths(view.rows)]
    parts += [Text(), _findings(view.findings)]
    return Group(*parts)


def conversation_text(shown: Shown) -> Text:
    """Returns a conversation: what is supervised in brackets and underlined, special tokens by their names."""
    text, inside = Text(), False
    for piece in shown.pieces:
        if piece.supervised != inside:
            text.append(CLOSE if inside else OPEN, style="mask")
            inside = piece.supervised
        style = ("supervised special" if piece.supervised else "special") if piece.special else "supervised"
        text.append(visible(piece.text), style=style if piece.special or piece.supervised else "")
    return text.append(CLOSE, style="mask") if inside else text


def visible(text: str) -> str:
    """Returns a text whose control characters are pictures of them."""
    return text.translate(PICTURES)


def _heading(shown: Shown, *, prompt: bool) -> Text:
    what = "prompt" if prompt else "conversation"
    mask = "" if prompt else f", {shown.supervised:,} supervised: {OPEN}these{CLOSE}"
    cut = "; cut at data.max_tokens" if shown.cut else ""
    return Text.assemble(
        (f"{what} ", "title"), (visible(shown.id), "name"), (f"  {shown.tokens:,} tokens{mask}{cut}", "note")
    )


def _numbers(view: DataView) -> Table:
    table = plain_table()
    table.add_column(style="name", no_wrap=True)
    table.add_column(overflow="fold")
    lines = {"recipe": view.recipe, "sources": _sources(view.sources)}
    if view.waiting is not None:
        lines["answers"] = f"of {view.waiting:,} prompts none is generated yet"
    if view.rows is not None:
        lines |= _row_lines(view.rows)
    lines["mask from"] = (
        "the chat template's own generation markers" if view.marked else "comparing renderings of the chat template"
    )
    if view.thinks is not None or view.thinking_share:
        lines["reasoning"] = _reasoning(view)
    if view.vocabulary is not None:
        lines |= _vocabulary_lines(view.vocabulary)
    lines["held out"] = _leakage(view.leakage)
    if view.on_policy is not None:
        lines["on-policy"] = _policy(view.on_policy)
        # Of foreign answers the finding below tells.
        lines |= {} if view.on_policy.verdict == "foreign" else {"which means": view.on_policy.words}
    for name, words in lines.items():
        table.add_row(name, Text(visible(words)))
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
    return f"{default[view.thinks]}; {view.thinking_share:.0%} of the conversations have a <think> block"


def _vocabulary_lines(vocabulary: Vocabulary) -> dict[str, str]:
    whole = vocabulary.size == vocabulary.of
    size = "the whole vocabulary" if whole else f"{vocabulary.size:,} of {vocabulary.of:,} tokens"
    most = ", ".join(f"{tau:.2f} for K = {k}" for k, tau in vocabulary.most.items())
    new = f", about {vocabulary.unseen:.1%} of new text; without any other error tau would end at about {most}"
    ends = ", ".join(f"{token} {count:,} times" for token, count in vocabulary.ends.items())
    missing = ", ".join(f"{token} {count:,} times" for token, count in vocabulary.missing.items())
    return {
        "can be drafted": f"{size}: {vocabulary.coverage:.1%} of what is supervised{'' if whole else new}",
        "ends": f"{ends}; all can be drafted",
        "special tokens": f"supervised and not to be drafted: {missing}" if missing else "none is missing",
    }


def _leakage(leakage: Leakage) -> str:
    if not leakage.held_out:
        return "nothing: the recipe names no suite"
    suites = ", ".join(f"{count:,} prompts of {suite}" for suite, count in leakage.held_out.items())
    seen = f"{leakage.same:,} are trained on" if leakage.same else "none is trained on"
    near = f"{leakage.near:,} training prompts are near-duplicates"
    return (
        f"{suites}: {seen}; {near} (the nearest shares {leakage.largest:.0%} of 5-grams, {leakage.limit:.0%} is near)"
    )


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
    title = f"{shortest:,} to {longest:,} tokens a conversation, half of them {low:,} to {high:,}, median {median:,}"
    table = plain_table()
    table.add_column(justify="right")
    table.add_column()
    largest = max(part.count for part in rows.histogram)
    for part in rows.histogram:
        bar = "█" * -(-BAR * part.count // largest)
        table.add_row(f"{part.low:,} to {part.high:,}", f"{bar} {part.count:,}".strip())
    return Group(Text(title), table)


def _findings(findings: Sequence[Finding]) -> RenderableType:
    if not findings:
        return Text("nothing to remark", style="good")
    return Group(*(part for finding in findings for part in _finding(finding)))


def _finding(finding: Finding) -> Iterator[RenderableType]:
    style = LEVELS[finding.level]
    yield Text.assemble((finding.level, style), (f" {finding.rule}: ", "title"), visible(finding.found))
    lines = [f"e.g. {visible(example)}" for example in finding.examples]
    lines += [f"do: {finding.todo}"] if finding.todo else []
    for line in lines:
        yield Padding(Text(line), (0, 0, 0, 4), expand=False)
