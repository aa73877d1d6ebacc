"""The stage `prepare`: turns the conversations of all sources into tokens and masks in one folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from speculators.data import encoded as names
from speculators.data.conversations import prompt_key, reasons_text, stream_source
from speculators.data.encoded import Conversations, Encoded
from speculators.data.messages import Conversation
from speculators.data.template import ALL_SUPERVISED, NONE_SUPERVISED, NOTHING_LEFT, ChatTemplate
from speculators.errors import DataError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.files.disk import file_sha256, write_whole
from speculators.files.folders import seal, whole_folder
from speculators.recipe.input_sections import DataSection

ROWS_PER_REPORT = 100
MASK_REMEDIES = {
    ALL_SUPERVISED: "fix the template's {% generation %} markers, or remove them: turns are then located by rendering",
    NONE_SUPERVISED: "fix the template's {% generation %} markers, or remove them: turns are then located by rendering",
    NOTHING_LEFT: "raise data.max_tokens",
}
# Share of the conversations: if one of these reasons costs more, training sees other data than the sources hold.
LOST_SHARE = 0.1


def prepare(
    section: DataSection,
    *,
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    base: Path,
    held_out: Collection[str] = frozenset(),
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
        key: fingerprint of the stage, which `Conversations.open` checks.
        progress: gets an event every so many conversations.

    Raises:
        DataError: a source cannot be used, nothing usable is left, or a conversation leaks a benchmark prompt.
        ArtifactError: the folder cannot be written.
    """
    template = ChatTemplate.of(tokenizer)
    with whole_folder(folder) as partial:
        tally = _Tally(vocab_size)
        with (partial / names.TOKENS).open("wb") as tokens, (partial / names.MASK).open("wb") as mask:
            for conversation in _stream(section, base, tally):
                if prompt_key(conversation.prompt) in held_out:
                    tally.leaked.append(conversation.id)
                row = template.encode(conversation, section.max_tokens)
                if isinstance(row, str):
                    tally.skip(conversation, row)
                else:
                    tally.add(conversation, row)
                    _write(row, tokens, mask)
                if tally.read % ROWS_PER_REPORT == 0:
                    progress(ProgressEvent(stage="prepare", done=tally.read, unit="conversations"))
        tally.check()
        _finish(partial, tally, {"key": key, "max_tokens": section.max_tokens, "sources": tally.sources}, template)
    progress(ProgressEvent(stage="prepare", done=tally.read, total=tally.read, unit="conversations"))
    return Conversations.open(folder)


def loss_mask_warnings(prepared: Conversations) -> list[str]:
    """Warns of each fault of the loss mask that costs many conversations, with the consequence and the remedy."""
    read = len(prepared) + sum(prepared.skipped.values())
    warnings = []
    for reason, remedy in MASK_REMEDIES.items():
        if (lost := prepared.skipped.get(reason, 0)) > LOST_SHARE * read:
            loss = f"{lost} of {read} conversations ({lost / read:.0%}) are not trained on: {reason}"
            warnings.append(f"{loss}; the draft learns only from the others, which may not be representative: {remedy}")
    return warnings


class _Tally:
    """Accumulates what stays in memory while conversations stream by: counts, and a few bytes for each."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = np.zeros(vocab_size, np.int64)
        self.lengths: list[int] = []
        self.supervised: list[int] = []
        self.ids: list[str] = []
        self.leaked: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.sources: list[dict[str, Any]] = []
        self.read = 0
        self.truncated = 0

    def add(self, conversation: Conversation, row: Encoded) -> None:
        if row.input_ids.max() >= len(self.counts):
            raise DataError(
                f"conversation {conversation.id}: the tokenizer gives token {row.input_ids.max()}, "
                f"but the verifier's vocabulary has only {len(self.counts)} tokens",
                hint="the tokenizer belongs to another model",
            )
        supervised = row.input_ids[row.loss_mask]
        np.add.at(self.counts, supervised, 1)
        self.lengths.append(len(row.input_ids))
        self.supervised.append(len(supervised))
        self.ids.append(_one_line(conversation.id))
        self.truncated += row.truncated

    def skip(self, conversation: Conversation, reason: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, _one_line(conversation.id))

    def check(self) -> None:
        if self.leaked:
            some = ", ".join(self.leaked[:5]) + (", ..." if len(self.leaked) > 5 else "")
            raise DataError(
                f"{len(self.leaked)} of {self.read} conversations start with a prompt of the benchmark: {some}",
                hint="remove them from the sources, or benchmark on another suite: its result could not be trusted",
            )
        if not self.lengths:
            most = self.skipped.most_common(1)[0][0]
            hint = MASK_REMEDIES.get(most, "check the data and the tokenizer's chat template")
            raise DataError(f"no conversation can be trained on: {reasons_text(self.skipped)}", hint=hint)


def _stream(section: DataSection, base: Path, tally: _Tally) -> Iterator[Conversation]:
    for source in section.sources:
        before = tally.read
        for conversation in stream_source(source, base, tally.skipped):
            tally.read += 1
            yield conversation
        tally.sources.append({"path": source.path, "split": source.split, "usable": tally.read - before})


def _write(row: Encoded, tokens: BinaryIO, mask: BinaryIO) -> None:
    tokens.write(row.input_ids.astype("<i4").tobytes())
    mask.write(row.loss_mask.tobytes())


def _finish(folder: Path, tally: _Tally, facts: dict[str, Any], template: ChatTemplate) -> None:
    np.save(folder / names.OFFSETS, np.concatenate([[0], np.cumsum(tally.lengths)]).astype(np.int64))
    np.save(folder / names.SUPERVISED, np.array(tally.supervised, np.int64))
    np.save(folder / names.COUNTS, tally.counts)
    write_whole(folder / names.IDS, "\n".join(tally.ids).encode())
    content = "".join(file_sha256(folder / name) for name in (names.TOKENS, names.MASK, names.OFFSETS))
    counts = {
        **facts,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "conversations": len(tally.lengths),
        "tokens": sum(tally.lengths),
        "supervised": sum(tally.supervised),
        "truncated": tally.truncated,
        "skipped": dict(tally.skipped.most_common()),
        "skipped_examples": tally.examples,
        "turn_ends": [int(number) for number in template.special_ids if _counted(tally.counts, number)],
        "chat_template_sha256": hashlib.sha256(template.source.encode()).hexdigest(),
    }
    seal(folder, counts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _counted(counts: np.ndarray, token: int) -> bool:
    return token < len(counts) and bool(counts[token])
