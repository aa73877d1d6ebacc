"""Reads every row once, as it was written: rows that cannot be used, repeats, prompts shared with the benchmark."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import prompt_key
from speculators.data.leakage import MAX_OVERLAP, Guard, HeldOut
from speculators.data.messages import Conversation
from speculators.data.sources import source_rows
from speculators.events import Progress, ProgressEvent, ignore
from speculators.inspection.kinds import kinds_of
from speculators.recipe.input_sections import DataSource

EXAMPLES = 3
ROWS_PER_REPORT = 1000


@attrs.frozen
class RawRow:
    """A row of a source.

    Attributes:
        place: file and line, for messages.
        source: the recipe's name for the source.
        value: the row in the layout of conversations.
        conversation: the parsed row, or the reason why it cannot be used.
    """

    place: str
    source: str
    value: Any
    conversation: Conversation | str


def raw_rows(sources: Iterable[DataSource], base: Path) -> Iterator[RawRow]:
    """Yields the rows of all sources, in order; raises DataError where one cannot be read."""
    for source in sources:
        for row in source_rows(source, base):
            yield RawRow(short_path(row.place), source.path, row.value, row.conversation())


def short_path(path: str) -> str:
    """Shortens a path below the working folder to a relative one."""
    whole = Path(path)
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else path


@attrs.define
class SuiteOverlap:
    """What the training prompts share with one suite of the benchmark.

    Attributes:
        prompts: of the suite.
        same: training prompts that equal one of them, apart from case and spacing.
        near: other training prompts with more than `MAX_OVERLAP` of the word 5-grams of one of them.
        largest: the largest such share of any training prompt that is not the same.
    """

    prompts: int
    same: int = 0
    near: int = 0
    largest: float = 0.0


class Survey:
    """Counts what the rows are like; filled by `survey_rows`.

    Attributes:
        rows: number of rows by source.
        usable: number of conversations.
        reasons: number of rows by reason not to use them.
        counts: number of rows of each kind: the reasons, the names below, and those of `inspection.kinds`.
        examples: places (and detail) of the first few rows of each kind.
        suites: overlap with each suite of the benchmark. `counts` has a row once, whatever the number of suites.
    """

    SAME, NEAR, REPEATED = "same", "near", "repeated"

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.usable = 0
        self.reasons: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)
        self.suites: dict[str, SuiteOverlap] = {}

    def note(self, kind: str, example: str) -> None:
        """Counts one row of a kind."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(example)

    def skip(self, reason: str, example: str) -> None:
        """Counts a row that cannot be used."""
        self.reasons[reason] += 1
        self.note(reason, example)


def survey_rows(rows: Iterable[RawRow], held_out: Iterable[HeldOut], *, progress: Progress = ignore) -> Survey:
    """Reads every row once.

    Args:
        rows: the rows of all sources.
        held_out: the benchmark's prompts.
        progress: gets an event every `ROWS_PER_REPORT` rows.
    """
    survey, seen, suites = Survey(), set[str](), defaultdict[str, list[HeldOut]](list)
    for prompt in held_out:
        suites[prompt.suite].append(prompt)
    survey.suites = {name: SuiteOverlap(prompts=len(prompts)) for name, prompts in suites.items()}
    same = {name: {prompt_key(each.prompt): each for each in prompts} for name, prompts in suites.items()}
    guards = {name: Guard(prompts) for name, prompts in suites.items()}
    for done, row in enumerate(rows, start=1):
        survey.rows[row.source] += 1
        if isinstance(row.conversation, str):
            survey.skip(row.conversation, row.place)
        else:
            survey.usable += 1
            _compare(survey, row, row.conversation, same, guards)
            for kind in kinds_of(row.conversation):
                survey.note(kind, f"{row.place} {row.conversation.id}")
            # 64 bits of the hash are enough to tell prompts apart, and keep the set of millions of rows small.
            key = prompt_key(row.conversation.prompt)[:16]
            if key in seen:
                survey.note(Survey.REPEATED, f"{row.place} {row.conversation.id}")
            seen.add(key)
        if done % ROWS_PER_REPORT == 0:
            progress(ProgressEvent(stage="data", done=done, unit="rows read"))
    return survey


def rows_of(rows: Iterable[RawRow], ids: Iterable[str]) -> dict[str, tuple[str, Conversation]]:
    """Finds the place and the conversation of each of these ids, reading no further than needed."""
    missing, usable = set(ids), dict[str, tuple[str, Conversation]]()
    for row in rows if missing else ():
        if not isinstance(row.conversation, str) and row.conversation.id in missing:
            missing.discard(row.conversation.id)
            usable[row.conversation.id] = row.place, row.conversation
            if not missing:
                break
    return usable


def _compare(
    survey: Survey,
    row: RawRow,
    conversation: Conversation,
    same: Mapping[str, Mapping[str, HeldOut]],
    guards: Mapping[str, Guard],
) -> None:
    """Compares a prompt with those of each suite."""
    key, example = prompt_key(conversation.prompt), f"{row.place} {conversation.id}"
    equal: HeldOut | None = None
    near: tuple[float, HeldOut] | None = None
    for name, overlap in survey.suites.items():
        if prompt := same[name].get(key):
            overlap.same += 1
            equal = equal or prompt
            continue
        share, nearest = guards[name].nearest(conversation.prompt)
        overlap.largest = max(overlap.largest, share)
        if nearest is not None and share > MAX_OVERLAP:
            overlap.near += 1
            near = max(near or (0.0, nearest), (share, nearest), key=lambda pair: pair[0])
    if equal:
        survey.note(Survey.SAME, f"{example} is {equal.suite}'s {equal.id}")
    elif near:
        survey.note(Survey.NEAR, f"{example} has {near[0]:.0%} of {near[1].suite}'s {near[1].id}")
