"""Renders conversations with the verifier's chat template, and encodes them as tokens with a loss mask."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import jinja2
import numpy as np

from speculators.data.encoded import Encoded
from speculators.data.messages import Conversation, Message, turn_inputs
from speculators.data.plain_text import encode_text
from speculators.data.turns import Render, Turn, dropped_part, header, locate_turn
from speculators.data.written import OTHER_TOKENIZER, from_other_tokenizer
from speculators.errors import DataError
from speculators.verifier.chat_template import FIXED_DATE, on_a_fixed_day, without_chance

NOT_AT_TOKEN = "an answer does not start or end at a token"
NOTHING_CHOSEN = "no answer is trained on: data.train_on or the messages' weights leave none"
NOTHING_LEFT = "no supervised token within max_tokens"
ALL_SUPERVISED = "every token is supervised: the chat template marks the prompt as generated"
NONE_SUPERVISED = "no token is supervised: the chat template's generation markers are empty"

# What Python raises inside a template that expects another kind of value.
_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

_THINKING = re.compile(r"{% set (?:enable_)?thinking = (true|false) %}")

Tools = Sequence[Mapping[str, Any]]
Row = tuple[np.ndarray, np.ndarray]  # ids [n] int32, mask [n] bool


@attrs.frozen
class ChatTemplate:
    """A tokenizer's chat template, ready to encode conversations.

    Attributes:
        tokenizer: a transformers tokenizer, from `load_tokenizer`, which gives it the recipe's template and arguments.
        source: the Jinja template.
        has_markers: the template marks what the assistant generates, with `{% generation %}`.
        special: matches the text of one special token.
        special_ids: [n] int64, the special tokens.
    """

    tokenizer: Any
    source: str
    has_markers: bool
    special: re.Pattern[str]
    special_ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Reads the template of a transformers tokenizer; raises DataError if there is none."""
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or 'the verifier'} has no chat template",
                hint="use an instruction-tuned verifier, or name a template: verifier.chat_template",
            ) from None
        added = tokenizer.added_tokens_decoder
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        special = named | {number: str(token) for number, token in added.items() if token.special}
        # Alternatives of a pattern are tried in order: a token that begins with another must come first.
        longest_first = sorted(special.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        numbers = np.fromiter(sorted(special), np.int64)
        return cls(tokenizer, source, marked and tokenizer.is_fast, re.compile(pattern), numbers)

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False, tools: Tools = (), documents: Tools = ()
    ) -> str:
        """Renders a conversation as text; with `prompt`, up to where the assistant's next answer starts.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        text: str = self._apply(messages, tools, documents, tokenize=False, add_generation_prompt=prompt)
        return text

    def prompt_ids(self, messages: Sequence[Message], *, tools: Tools = (), documents: Tools = ()) -> list[int]:
        """Tokenizes a prompt up to where the assistant's answer starts; raises DataError if the template refuses it."""
        try:
            return self._tokens(self.render(messages, prompt=True, tools=tools, documents=documents))
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses a prompt: {error}") from None

    def thinks_by_default(self) -> bool | None:
        """Whether a prompt asks for reasoning by default; None if the template has no such switch.

        The switch is `enable_thinking` in most templates and `thinking` in some; templates ignore unknown switches.
        """
        question = [Message("user", "question")]
        switches: tuple[dict[str, bool], ...] = ({}, *({"enable_thinking": on, "thinking": on} for on in (True, False)))
        try:
            plain, on, off = (
                self._apply(question, (), (), tokenize=False, add_generation_prompt=True, **switch)
                for switch in switches
            )
        except jinja2.TemplateError:
            return None
        if on != off:
            return bool(plain == on)
        # Arguments of the recipe stand in the first line, and decide.
        fixed = _THINKING.search(self.source.partition("\n")[0])
        return None if fixed is None else fixed[1] == "true"

    def encode(self, conversation: Conversation, max_tokens: int) -> list[Encoded] | str:
        """Encodes a conversation as rows of at most `max_tokens`, or returns the reason why it cannot be used.

        Each supervised turn follows its own prompt, as it would be served. A turn whose prompt extends the row before
        joins that row, so most conversations are one row; a template that shows history otherwise than it was written
        (without reasoning, say) gives several.

        The mask comes from the template's generation markers, if it has any. Otherwise it covers what `locate_turn`
        finds. Answers that came with their ids are not rendered: their rows are what the verifier read and wrote.
        """
        if conversation.text is not None:
            row = encode_text(self.tokenizer, conversation.text, max_tokens)
            return row if isinstance(row, str) else [row]
        try:
            rows = self._rows(conversation)
        except jinja2.TemplateError as error:
            return f"the chat template refuses it: {error}"
        return rows if isinstance(rows, str) else _cut(_joined(rows), max_tokens)

    def _rows(self, conversation: Conversation) -> list[Row] | str:
        if conversation.written:
            if from_other_tokenizer(self.tokenizer, conversation.written):
                return OTHER_TOKENIZER
            chosen = [each for each in conversation.written if conversation.messages[each.turn].supervised]
            return [_written_row(each.prompt, each.answer) for each in chosen] or NOTHING_CHOSEN
        encode = self._marked if self.has_markers else self._compared
        rows = []
        for index, message in enumerate(conversation.messages):
            if message.role == "assistant" and message.supervised and index > 0:
                row = encode(conversation, conversation.messages[: index + 1])
                if isinstance(row, str):
                    return row
                if row[1].all():
                    return ALL_SUPERVISED
                rows.append(row)
        return rows or NOTHING_CHOSEN

    def _marked(self, conversation: Conversation, messages: Sequence[Message]) -> Row | str:
        """Supervises what the template marks in the last of the messages."""
        row = self._apply(
            messages,
            conversation.tools,
            conversation.documents,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, mask = np.array(row["input_ids"], np.int32), np.array(row["assistant_masks"], np.bool_)
        if mask.all() or not mask.any():
            return ALL_SUPERVISED if mask.all() else NONE_SUPERVISED
        render = self._renderer(conversation)
        if reason := dropped_part(render, messages):
            return reason
        shared = _end_of_history(render, messages)
        mask &= np.array(row["offset_mapping"], np.int64).reshape(-1, 2)[:, 0] >= shared
        if not mask.any():
            return NONE_SUPERVISED
        special = np.isin(ids, self.special_ids)
        if not special[mask].any():
            # The markers surround the content only. A speculator must learn where a turn ends, so supervise the special
            # token that follows, too.
            mask[1:] |= mask[:-1] & special[1:]
        return ids, mask

    def _compared(self, conversation: Conversation, messages: Sequence[Message]) -> Row | str:
        """Supervises what follows the prompt of the last of the messages."""
        turn = locate_turn(self._renderer(conversation), messages, self.special)
        if isinstance(turn, str):
            return turn
        return self._by_offsets(turn) if self.tokenizer.is_fast else self._by_prefix(turn)

    def _by_offsets(self, turn: Turn) -> Row:
        ids, starts, ends = self._offsets(turn.text)
        if ((starts < turn.start) & (ends > turn.start)).any():
            # One token spans the end of the prompt and the start of the answer ("\n\n"), but a server tokenizes the
            # prompt by itself, and the verifier goes on from there.
            prompt = self._tokens(turn.text[: turn.start])
            ids, starts, ends = self._offsets(turn.text[turn.start :])
            mask = (ends > starts) & (starts < turn.end - turn.start)
            head = np.array(prompt, np.int32)
            return np.concatenate([head, ids]), np.concatenate([np.zeros(len(head), np.bool_), mask])
        # `ends > starts`: some tokenizers trim the blank before an answer to an empty span at the answer's start, which
        # must not be supervised.
        return ids, (starts >= turn.start) & (ends > starts) & (ends > turn.start) & (starts < turn.end)

    def _by_prefix(self, turn: Turn) -> Row | str:
        """Does the same for tokenizers without offsets, by tokenizing the text up to each place."""
        ids = self._tokens(turn.text)
        mask = np.zeros(len(ids), np.bool_)
        heads = [self._tokens(turn.text[:place]) for place in (turn.start, turn.end)]
        if any(ids[: len(head)] != head for head in heads):
            return NOT_AT_TOKEN
        mask[len(heads[0]) : len(heads[1])] = True
        return np.array(ids, np.int32), mask

    def _renderer(self, conversation: Conversation) -> Render:
        return functools.partial(self.render, tools=conversation.tools, documents=conversation.documents)

    def _apply(self, messages: Sequence[Message], tools: Tools, documents: Tools, **options: Any) -> Any:
        """Applies the template to turns, with nothing that it could read from outside; raises jinja2.TemplateError."""
        source = self.tokenizer.get_chat_template(tools=list(tools) or None)
        apply = functools.partial(
            self.tokenizer.apply_chat_template,
            tools=[dict(tool) for tool in tools] or None,
            documents=[dict(document) for document in documents] or None,
            chat_template=on_a_fixed_day(source),
            date_string=FIXED_DATE,
            **options,
        )
        with without_chance(source):
            try:
                return apply(turn_inputs(messages, source))
            except _PYTHON_ERRORS as error:
                if not any(message.tool_calls for message in messages):
                    raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None
            try:
                return apply(turn_inputs(messages, source, arguments_as_text=True))
            except _PYTHON_ERRORS as error:
                raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        starts, ends = np.array(row["offset_mapping"], np.int64).reshape(-1, 2).T
        return np.array(row["input_ids"], np.int32), starts, ends


def _end_of_history(render: Render, messages: Sequence[Message]) -> int:
    """Finds the place up to which a rendered turn is its own prompt: marks before it belong to earlier turns."""
    try:
        prompt, text = header(render(messages[:-1], prompt=True)), render(messages)
    except jinja2.TemplateError:
        # A template with marks need not know how to render a prompt.
        return 0
    pairs = enumerate(zip(prompt, text, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(prompt), len(text)))


def _written_row(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    mask = np.zeros(len(prompt) + len(answer), np.bool_)
    mask[len(prompt) :] = True
    return np.array([*prompt, *answer], np.int32), mask


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Joins each row to the one before it, if it begins with that one's tokens up to the end of its answer."""
    joined: list[Row] = []
    for ids, mask in rows:
        if joined:
            before, supervised = joined[-1]
            end = int(np.flatnonzero(supervised)[-1]) + 1
            if len(ids) >= end and np.array_equal(ids[:end], before[:end]):
                mask[:end] |= supervised[:end]
                joined.pop()
        joined.append((ids, mask))
    return joined


def _cut(rows: Sequence[Row], max_tokens: int) -> list[Encoded] | str:
    encoded = []
    for ids, mask in rows:
        mask[0] = False  # nothing predicts the first token
        if mask[:max_tokens].any():
            encoded.append(Encoded(ids[:max_tokens], mask[:max_tokens], truncated=len(ids) > max_tokens))
    if encoded and len(encoded) < len(rows):
        encoded[-1] = attrs.evolve(encoded[-1], truncated=True)
    return encoded or NOTHING_LEFT
