"""Has the verifier write the answers of conversations, turn after turn, and writes the file of them.

Every turn of the assistant is written anew, on the history that the verifier has at that place: its own earlier
answers, shown as the chat template shows history when it is served. Results of tools are kept from the data. They
answer the data's calls, so these calls stay in the history of later turns, even where the verifier called something
else; what it wrote instead is trained on at its own place.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from speculators.data.messages import Message
from speculators.data.replies import AnswerReader
from speculators.data.template import ChatTemplate
from speculators.data.written import exact_text
from speculators.errors import DataError
from speculators.events import Progress, ProgressEvent
from speculators.files.disk import whole_file
from speculators.pipeline.dialogues import Dialogue, Reply
from speculators.pipeline.journal import AnswerJournal
from speculators.verifier.generate import Sampling


class Answerer(Protocol):
    """Answers prompts: the verifier in this process, or a server."""

    @property
    def tokenizer(self) -> Any:
        """The verifier's tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""

    def generate_batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, done: Container[int], progress: Progress
    ) -> Iterator[tuple[tuple[int, ...], Sequence[list[int]]]]:
        """Yields answers as `Engine.generate_batches` does."""


@attrs.frozen
class _Open:
    """A turn that waits for its answer: the index of its conversation, and the prompt."""

    row: int
    prompt: tuple[int, ...]


class Conversing:
    """Conversations that are being written: one turn of each at a time, so that turns are answered in batches.

    Args:
        dialogues: what to write.
        answerer: the verifier.
        max_tokens: a later turn whose prompt has as many is left out, because nothing of its answer could be trained
            on.

    Attributes:
        dialogues: those that the chat template does not refuse.
        prompts: the ids of their first prompts.
        replies: the answers so far, as the messages that they are in later prompts.

    Raises:
        DataError: the chat template refuses all of them.
    """

    def __init__(self, dialogues: Sequence[Dialogue], answerer: Answerer, *, max_tokens: int) -> None:
        self.answerer, self.max_tokens = answerer, max_tokens
        self._template = ChatTemplate.of(answerer.tokenizer)
        self._reader = AnswerReader.of(self._template)
        self._stop_ids = frozenset(answerer.stop_ids)
        self._too_long = self._unfit = 0
        # Place and reason of each conversation that the template refuses.
        self._refused: list[str] = []
        self.dialogues: list[Dialogue] = []
        self.prompts: list[list[int]] = []
        for dialogue in dialogues:
            self._try(dialogue)
        if not self.dialogues:
            raise DataError(f"no conversation can be answered: {self._refused[0]}")
        self.replies: list[list[Message]] = [[] for _ in self.dialogues]

    def _try(self, dialogue: Dialogue) -> None:
        """Tokenizes the prompts of all turns, the later ones with the answers of the data."""
        try:
            prompts = [self._prompt(dialogue, dialogue.messages_before(turn)) for turn in range(len(dialogue.turns))]
        except DataError as error:
            self._refused.append(f"{dialogue.place}: {error}")
        else:
            self.dialogues.append(dialogue)
            self.prompts.append(prompts[0])

    def answer(self, sampling: Sampling, journal: AnswerJournal, progress: Progress) -> None:
        """Answers all turns; `journal` has those of an interrupted run, and gets the others."""
        total = sum(len(dialogue.turns) for dialogue in self.dialogues)
        done = 0
        for number in range(max(len(dialogue.turns) for dialogue in self.dialogues)):
            turns = list(self._open_turns(number))
            # A seed for each round: the second answer of a conversation is no copy of its first.
            seeded = attrs.evolve(sampling, seed=sampling.seed + number)
            finished = {place for place, turn in enumerate(turns) if (turn.row, number) in journal}
            batches = self.answerer.generate_batches(
                [turn.prompt for turn in turns], seeded, done=finished, progress=_shifted(progress, done, total)
            )
            for places, answers in batches:
                journal.add(
                    ((turns[place].row, number), list(answer)) for place, answer in zip(places, answers, strict=True)
                )
            for turn in turns:
                answer = journal[turn.row, number]
                message = self._reader.read(self.answerer.tokenizer, turn.prompt, answer, self._stop_ids)
                self.replies[turn.row].append(message)
            done += len(turns)

    def warnings(self) -> list[str]:
        """Says how many conversations are left out or end before their last turn, and why."""
        reasons = {
            f"their next prompt has data.max_tokens = {self.max_tokens} tokens or more": self._too_long,
            "the chat template refuses the history that the verifier wrote": self._unfit,
        }
        left_out = f"{len(self._refused)} conversations are left out: " + "".join(self._refused[:1])
        early = [f"{count} conversations end early: {reason}" for reason, count in reasons.items() if count]
        return [*([left_out] if self._refused else []), *early]

    def rows(self, journal: AnswerJournal) -> Iterator[dict[str, Any]]:
        """Yields the rows of the file of answers, in order; ids come from the journal, one row at a time."""
        for row, dialogue in enumerate(self.dialogues):
            messages = self.replies[row]
            yield dialogue.rewritten(
                [self._reply(dialogue, messages[: turn + 1], journal[row, turn]) for turn in range(len(messages))]
            )

    def _open_turns(self, number: int) -> Iterator[_Open]:
        for row, dialogue in enumerate(self.dialogues):
            if number >= len(dialogue.turns) or len(self.replies[row]) < number:
                continue
            try:
                prompt = self._prompt(dialogue, dialogue.history(self.replies[row]))
            except DataError:
                # Tried before with the data's answers: something in the verifier's own does not fit the template.
                self._unfit += 1
                continue
            if number and len(prompt) >= self.max_tokens:
                self._too_long += 1
            else:
                yield _Open(row, tuple(prompt))

    def _prompt(self, dialogue: Dialogue, history: Sequence[Message]) -> list[int]:
        shown = dialogue.conversation
        return self._template.prompt_ids(history, tools=shown.tools, documents=shown.documents)

    def _reply(self, dialogue: Dialogue, messages: Sequence[Message], answer: list[int]) -> Reply:
        """Puts the last of the messages together with the ids that the verifier read and wrote."""
        prompt = self._prompt(dialogue, dialogue.history(messages[:-1]))
        text = exact_text(self.answerer.tokenizer, answer)
        return Reply(message=messages[-1], prompt=tuple(prompt), answer=tuple(answer), text=text)


def write_rows(file: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Writes rows as JSONL, one at a time; the file appears whole or not at all."""
    with whole_file(file) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _shifted(progress: Progress, done: float, total: int) -> Progress:
    """Counts the turns of all rounds, not of one."""

    def shifted(event: ProgressEvent) -> None:
        progress(attrs.evolve(event, done=event.done + done, total=total))

    return shifted
