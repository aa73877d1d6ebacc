"""The verifier's chat template: rendering a conversation, and which of its tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import attrs
import jinja2
import numpy as np

from speculators.data.conversations import Conversation, Message
from speculators.data.encoded import Encoded
from speculators.errors import DataError

# Llama 3's templates print today's date unless they are given one; the tokens must not depend on the day.
FIXED_DATE = "26 Jul 2024"

REWRITES_HISTORY = "the chat template renders history differently (does it drop reasoning?)"
REWRITES_ANSWER = "the chat template drops or rewrites part of an answer"
NOT_AT_TOKEN = "an answer does not start or end at a token"
NOTHING_LEFT = "no supervised token within max_tokens"
ALL_SUPERVISED = "every token is supervised: the chat template marks the prompt as generated"
NONE_SUPERVISED = "no token is supervised: the chat template's generation markers are empty"


@attrs.frozen
class ChatTemplate:
    """A tokenizer's chat template, ready to encode conversations.

    Attributes:
        tokenizer: of transformers.
        source: the Jinja template.
        has_markers: the template says itself what the assistant generates, by `{% generation %}`.
        special: matches one special token's text.
        turn_end: matches blanks and one special token's text.
        special_ids: [n] int64, the special tokens.
    """

    tokenizer: Any
    source: str
    has_markers: bool
    special: re.Pattern[str]
    turn_end: re.Pattern[str]
    special_ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Returns the template of a transformers tokenizer; raises DataError if it has none."""
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or 'the verifier'} has no chat template",
                hint="use an instruction-tuned verifier, or put chat_template.jinja into its folder",
            ) from None
        added = tokenizer.added_tokens_decoder
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        special = named | {number: str(token) for number, token in added.items() if token.special}
        longest_first = sorted(special.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        numbers = np.fromiter(sorted(special), np.int64)
        turn_end = re.compile(rf"\s*(?:{pattern})")
        return cls(tokenizer, source, marked and tokenizer.is_fast, re.compile(pattern), turn_end, numbers)

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Returns the conversation's text; with `prompt`, up to where the assistant's next answer starts.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        return self.tokenizer.apply_chat_template(
            [attrs.asdict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            date_string=FIXED_DATE,
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens after which the assistant's next answer starts; DataError if the template refuses."""
        try:
            return self._tokens(self.render(messages, prompt=True))
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses a prompt: {error}") from None

    def thinks_by_default(self) -> bool | None:
        """Returns whether a prompt asks for reasoning when nobody says so; None where the template has no such switch.

        The switch is `enable_thinking` in most templates, `thinking` in some; a template ignores what it does not know.
        """
        question = [{"role": "user", "content": "question"}]
        switches: tuple[dict[str, bool], ...] = ({}, *({"enable_thinking": on, "thinking": on} for on in (True, False)))
        try:
            plain, on, off = (
                self.tokenizer.apply_chat_template(
                    question, tokenize=False, add_generation_prompt=True, date_string=FIXED_DATE, **switch
                )
                for switch in switches
            )
        except jinja2.TemplateError:
            return None
        return None if on == off else bool(plain == on)

    def encode(self, conversation: Conversation, max_tokens: int) -> Encoded | str:
        """Returns the conversation as one row of at most `max_tokens`, or the reason why it cannot be used.

        The mask comes from the template's own generation markers where it has them. Else each assistant turn is what
        the whole text has after the text that prompts for it, its end-of-turn token included and nothing behind it.
        """
        try:
            encoded = self._marked(conversation) if self.has_markers else self._compared(conversation)
        except jinja2.TemplateError as error:
            return f"the chat template refuses it: {error}"
        if isinstance(encoded, str):
            return encoded
        ids, mask = encoded
        if mask.all():
            return ALL_SUPERVISED
        if not mask.any():
            return NONE_SUPERVISED
        mask[0] = False  # nothing predicts the first token
        if not mask[:max_tokens].any():
            return NOTHING_LEFT
        return Encoded(ids[:max_tokens], mask[:max_tokens], truncated=len(ids) > max_tokens)

    def _marked(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        row = self.tokenizer.apply_chat_template(
            [attrs.asdict(message) for message in conversation.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            date_string=FIXED_DATE,
        )
        ids, mask = np.array(row["input_ids"], np.int32), np.array(row["assistant_masks"], np.bool_)
        special = np.isin(ids, self.special_ids)
        if not special[mask].any():
            # Markers around the content alone: a speculator must learn where a turn ends, so take the next token in.
            mask[1:] |= mask[:-1] & special[1:]
        return ids, mask

    def _compared(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray] | str:
        text = self.render(conversation.messages)
        spans = []
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant":
                span = self._span(text, self.render(conversation.messages[:place], prompt=True), message.content)
                if isinstance(span, str):
                    return span
                spans.append(span)
        return self._masked(text, spans) if self.tokenizer.is_fast else self._masked_by_prefix(text, spans)

    def _span(self, text: str, prompt: str, answer: str) -> tuple[int, int] | str:
        """Returns where in `text` the answer to `prompt` starts and where its end-of-turn token ends."""
        if not text.startswith(prompt):
            return REWRITES_HISTORY
        start = len(prompt)
        found = text.find(answer.strip(), start)
        if found < 0 or self.special.search(text, start, found):
            return REWRITES_ANSWER
        end = found + len(answer.strip())
        turn_end = self.turn_end.match(text, end)
        return start, turn_end.end() if turn_end else end

    def _masked(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        row = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        starts, ends = np.array(row["offset_mapping"], np.int64).reshape(-1, 2).T
        mask = np.zeros(len(starts), np.bool_)
        for start, end in spans:
            # `ends > start`: some tokenizers trim the blank before an answer to an empty span at the answer's start.
            mask |= (starts >= start) & (ends > start) & (starts < end)
        return np.array(row["input_ids"], np.int32), mask

    def _masked_by_prefix(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray] | str:
        """As `_masked`, for tokenizers that do not tell their tokens' places: tokenizes up to each place instead."""
        ids = self._tokens(text)
        mask = np.zeros(len(ids), np.bool_)
        for span in spans:
            heads = [self._tokens(text[:place]) for place in span]
            if any(ids[: len(head)] != head for head in heads):
                return NOT_AT_TOKEN
            mask[len(heads[0]) : len(heads[1])] = True
        return np.array(ids, np.int32), mask

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
