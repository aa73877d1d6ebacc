"""One pass over the rows as they were written: what cannot be used, what repeats, what the benchmark has, too."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import Conversation, parse, prompt_key, source_rows, source_stem
from speculators.data.leakage import MAX_OVERLAP, Guard, HeldOut
from speculators.events import Progress, ProgressEvent, ignore
from speculators.recipe.input_sections import DataSource

EXAMPLES = 3
ROWS_PER_REPORT = 1000
THINK = "<think>"
# Where data sets keep reasoning apart from the answer; conversations are read without these.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@attrs.frozen
class RawRow:
    """A row of a source.

    Attributes:
        place: file and line, for messages.
        source: what the recipe calls the source.
        value: as it was written.
        conversation: what it holds, or the reason why it cannot be used.
    """

    place: str
    source: str
    value: Any
    conversation: Conversation | str


def raw_rows(sources: Iterable[DataSource], base: Path) -> Iterator[RawRow]:
    """Yields the rows of all sources, in order; raises DataError where one cannot be read."""
    for source in sources:
        stem = source_stem(source, base)
        for number, value in source_rows(source, base):
            yield RawRow(f"{short_path(source.path)}:{number}", source.path, value, parse(value, f"{stem}:{number}"))


def short_path(path: str) -> str:
    """Returns a path as seen from the working folder, if it is below it."""
    whole = Path(path)
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else path


class Survey:
    """What the rows are like; filled by `survey`.

    Attributes:
        rows: by source.
        usable: conversations.
        counts: how many rows there are of each kind: of each reason not to use a row, and of the names below.
        examples: places (and what is there) of the first few of each kind.
        largest: largest overlap with a benchmark prompt that is not the same.
    """

    SAME, NEAR, REPEATED, THINKING, REASONING = "same", "near", "repeated", "thinking", "reasoning"

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.usable = 0
        self.reasons: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)
        self.largest = 0.0

    def note(self, kind: str, example: str) -> None:
        """Counts one row of a kind."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(example)

    def skip(self, reason: str, example: str) -> None:
        """Counts a row that cannot be used."""
        self.reasons[reason] += 1
        self.note(reason, example)


def survey(rows: Iterable[RawRow], held_out: Iterable[HeldOut], *, progress: Progress = ignore) -> Survey:
    """Looks at every row once.

    Args:
        rows: of all sources.
        held_out: the benchmark's prompts.
        progress: told every so many rows.
    """
    found, held = Survey(), list(held_out)
    same = {prompt_key(one.prompt): one for one in held}
    guard, seen = Guard(held), set[str]()
    for done, row in enumerate(rows, start=1):
        found.rows[row.source] += 1
        if isinstance(row.conversation, str):
            found.skip(row.conversation, row.place)
        else:
            found.usable += 1
            _look(found, row, row.conversation, same, guard)
            key = prompt_key(row.conversation.prompt)[:16]
            if key in seen:
                found.note(Survey.REPEATED, f"{row.place} {row.conversation.id}")
            seen.add(key)
        if done % ROWS_PER_REPORT == 0:
            progress(ProgressEvent(stage="data", done=done, unit="rows looked at"))
    return found


def places_of(rows: Iterable[RawRow], ids: Iterable[str]) -> dict[str, str]:
    """Returns where the conversations of these ids are written; reads no further than it must."""
    missing, found = set(ids), dict[str, str]()
    for row in rows if missing else ():
        if not isinstance(row.conversation, str) and row.conversation.id in missing:
            missing.discard(row.conversation.id)
            found[row.conversation.id] = row.place
            if not missing:
                break
    return found


def _look(found: Survey, row: RawRow, conversation: Conversation, same: Mapping[str, HeldOut], guard: Guard) -> None:
    here = f"{row.place} {conversation.id}"
    if held := same.get(prompt_key(conversation.prompt)):
        found.note(Survey.SAME, f"{here} is {held.suite}'s {held.id}")
    else:
        share, nearest = guard.nearest(conversation.prompt)
        found.largest = max(found.largest, share)
        if nearest is not None and share > MAX_OVERLAP:
            found.note(Survey.NEAR, f"{here} has {share:.0%} of {nearest.suite}'s {nearest.id}")
    if any(THINK in message.content for message in conversation.messages if message.role == "assistant"):
        found.note(Survey.THINKING, here)
    if _has_reasoning_field(row.value):
        found.note(Survey.REASONING, here)


def _has_reasoning_field(value: Any) -> bool:
    messages = value.get("messages") if isinstance(value, Mapping) else None
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and any(message.get(field) for field in REASONING_FIELDS) for message in messages
    )
