"""The stage `prepare`: turns the conversations of all sources into tokens and masks in one folder."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from speculators.data import encoded as names
from speculators.data.conversations import (
    LAYOUT,
    NO_ANSWER,
    NO_MESSAGES,
    prompt_key,
    reasons_text,
)
from speculators.data.encoded import Conversations, Encoded, row_names
from speculators.data.encoding import encode_all
from speculators.data.messages import Conversation
from speculators.data.planned import as_planned, with_identities
from speculators.data.sources import stream_source
from speculators.data.template import ALL_SUPERVISED, NONE_SUPERVISED, NOTHING_LEFT, ChatTemplate
from speculators.data.turns import DROPS_CALLS, DROPS_REASONING, REWRITES_ANSWER, REWRITES_HISTORY
from speculators.data.written import OTHER_TOKENIZER
from speculators.errors import DataError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.files.disk import file_sha256
from speculators.files.folders import seal, whole_folder
from speculators.recipe.input_sections import DataSection

ROWS_PER_REPORT = 100
_MARKERS = "fix the template's {% generation %} markers, or remove them: turns are then located by rendering"
_MARK = "mark the answers with {% generation %} in a copy of the template, and name it as verifier.chat_template"
REMEDIES = {
    NO_MESSAGES: LAYOUT,
    NO_ANSWER: "add answers: [data.regenerate] lets the verifier write them",
    ALL_SUPERVISED: _MARKERS,
    NONE_SUPERVISED: _MARKERS,
    NOTHING_LEFT: "raise data.max_tokens",
    OTHER_TOKENIZER: "have this verifier write the answers (spec regenerate), or remove token_ids to train on the text",
    REWRITES_HISTORY: _MARK,
    REWRITES_ANSWER: _MARK,
    DROPS_REASONING: "name a template that shows reasoning as verifier.chat_template, or leave it out of the data",
    DROPS_CALLS: "name a template that shows tool calls as verifier.chat_template",
}
# Share of the conversations: if more is lost, training sees other data than the sources hold.
LOST_SHARE = 0.05


def prepare(
    section: DataSection,
    *,
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    base: Path,
    held_out: Collection[str] = frozenset(),
    planned: Sequence[Mapping[str, Any]] = (),
    key: str = "",
    progress: Progress = ignore,
) -> Conversations:
    """Tokenizes every conversation of the sources into `folder`, which appears whole or not at all.

    Args:
        section: sources, in order, and max_tokens.
        folder: the output.
        tokenizer: the verifier's transformers tokenizer.
        vocab_size: V, from the verifier's config.json.
        base: the folder from which relative paths of sources start.
        held_out: `prompt_key` of every benchmark prompt; a conversation that starts with one is an error.
        planned: the identity of each source in `key`; () where there is no plan.
        key: fingerprint of the stage, which `Conversations.open` checks.
        progress: gets an event every so many conversations.

    Raises:
        DataError: a source cannot be used or is not what was planned, nothing usable is left, or a conversation leaks a
            benchmark prompt.
        ArtifactError: the folder cannot be written.
    """
    template = ChatTemplate.of(tokenizer)
    with whole_folder(folder) as partial:
        tally = _Tally(vocab_size)
        chosen = (each.training_on(section.train_on) for each in _stream(section, base, planned, tally))
        with _opened(partial) as files, closing(encode_all(chosen, template, section.max_tokens)) as encoded:
            for done, (conversation, rows) in enumerate(encoded, 1):
                if prompt_key(conversation.prompt) in held_out:
                    tally.leaked.append(conversation.id)
                if isinstance(rows, str):
                    tally.skip(conversation, rows)
                else:
                    _write(rows, tally.add(conversation, rows), files)
                if done % ROWS_PER_REPORT == 0:
                    progress(ProgressEvent(stage="prepare", done=done, unit="conversations"))
        tally.check(section.allow_lost)
        _finish(partial, tally, {"key": key, "max_tokens": section.max_tokens, "sources": tally.sources}, template)
    progress(ProgressEvent(stage="prepare", done=tally.read, total=tally.read, unit="conversations"))
    return Conversations.open(folder)


def loss_warnings(prepared: Conversations) -> list[str]:
    """Warns if many conversations are left out, with the reasons, the consequence and the remedy."""
    lost = sum(prepared.skipped.values())
    read = prepared.conversations + lost
    if lost <= LOST_SHARE * read:
        return []
    loss = f"{lost} of {read} conversations ({lost / read:.0%}) are not trained on: {reasons_text(prepared.skipped)}"
    consequence = "the draft learns only from the others, which may not be representative"
    return [f"{loss}; {consequence}: {_remedy(prepared.skipped)}"]


def _remedy(skipped: Mapping[str, int]) -> str:
    most = max(skipped, key=lambda reason: skipped[reason])
    return REMEDIES.get(most, "check the data and the tokenizer's chat template")


class _Tally:
    """Accumulates what stays in memory while conversations stream by: counts, and a few bytes for each."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, np.int64)
        # Eight bytes for each row.
        self.lengths = array("q")
        self.supervised = array("q")
        self.leaked: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.sources: list[dict[str, Any]] = []
        self.ends: set[int] = set()
        self.read = 0
        self.encoded = 0
        self.truncated = 0

    def add(self, conversation: Conversation, rows: Sequence[Encoded]) -> list[str]:
        """Counts the rows of a conversation, and returns their names."""
        named = row_names(_one_line(conversation.id), len(rows))
        for name, row in zip(named, rows, strict=True):
            self._add(name, row)
        self.encoded += 1
        self.truncated += any(row.truncated for row in rows)
        return named

    def _add(self, name: str, row: Encoded) -> None:
        if row.input_ids.max() >= len(self.counts):
            raise DataError(
                f"conversation {name}: the tokenizer gives token {row.input_ids.max()}, "
                f"but the verifier's vocabulary has only {len(self.counts)} tokens",
                hint="the tokenizer belongs to another model",
            )
        supervised = row.input_ids[row.loss_mask]
        np.add.at(self.counts, supervised, 1)
        self.lengths.append(len(row.input_ids))
        self.supervised.append(len(supervised))
        last = row.loss_mask & ~np.append(row.loss_mask[1:], False)
        self.ends |= set(row.input_ids[last].tolist())

    def skip(self, conversation: Conversation, reason: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, _one_line(conversation.id))

    def check(self, allow_lost: float) -> None:
        if self.leaked:
            some = ", ".join(self.leaked[:5]) + (", ..." if len(self.leaked) > 5 else "")
            raise DataError(
                f"{len(self.leaked)} of {self.read} conversations start with a prompt of the benchmark: {some}",
                hint="remove them from the sources, or benchmark on another suite: its result could not be trusted",
            )
        lost = self.skipped.total()
        if not self.lengths:
            raise DataError(
                f"no conversation can be trained on: {reasons_text(self.skipped)}", hint=_remedy(self.skipped)
            )
        if lost > allow_lost * (self.encoded + lost):
            raise DataError(
                f"{lost} of {self.encoded + lost} conversations cannot be trained on, more than data.allow_lost = "
                f"{allow_lost:g} allows: {reasons_text(self.skipped)}",
                hint=f"{_remedy(self.skipped)}; or train on the others alone: data.allow_lost = 1.0",
            )


def _stream(
    section: DataSection, base: Path, planned: Sequence[Mapping[str, Any]], tally: _Tally
) -> Iterator[Conversation]:
    for source, identity in with_identities(section.sources, planned):
        before = tally.read
        with as_planned(source, identity):
            for conversation in stream_source(source, base, tally.skipped):
                tally.read += 1
                yield conversation
        tally.sources.append({"path": source.path, "split": source.split, "usable": tally.read - before})


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[BinaryIO, BinaryIO, BinaryIO]]:
    """Opens the files of tokens, masks and names."""
    with (
        (folder / names.TOKENS).open("wb") as tokens,
        (folder / names.MASK).open("wb") as mask,
        (folder / names.IDS).open("wb") as ids,
    ):
        yield tokens, mask, ids


def _write(rows: Sequence[Encoded], named: Sequence[str], files: tuple[BinaryIO, BinaryIO, BinaryIO]) -> None:
    tokens, mask, ids = files
    for name, row in zip(named, rows, strict=True):
        ids.write(b"\n" * (tokens.tell() > 0) + name.encode())
        tokens.write(row.input_ids.astype("<i4").tobytes())
        mask.write(row.loss_mask.tobytes())


def _finish(folder: Path, tally: _Tally, facts: dict[str, Any], template: ChatTemplate) -> None:
    np.save(folder / names.OFFSETS, np.concatenate([[0], np.cumsum(tally.lengths)]).astype(np.int64))
    np.save(folder / names.SUPERVISED, np.array(tally.supervised, np.int64))
    np.save(folder / names.COUNTS, tally.counts)
    content = "".join(file_sha256(folder / name) for name in (names.TOKENS, names.MASK, names.OFFSETS))
    counts = {
        **facts,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "conversations": tally.encoded,
        "tokens": sum(tally.lengths),
        "supervised": sum(tally.supervised),
        "truncated": tally.truncated,
        "skipped": dict(tally.skipped.most_common()),
        "skipped_examples": tally.examples,
        "turn_ends": [int(number) for number in template.special_ids if int(number) in tally.ends],
        "chat_template_sha256": hashlib.sha256(template.source.encode()).hexdigest(),
    }
    seal(folder, counts)


def _one_line(text: str) -> str:
    return " ".join(text.split())
