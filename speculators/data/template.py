"""Renders conversations with the verifier's chat template, and locates the assistant's tokens in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import attrs
import jinja2
import numpy as np

from speculators.data.encoded import Encoded
from speculators.data.messages import Conversation, Message
from speculators.errors import DataError

# Llama 3's templates print today's date unless they get one, and tokens must not depend on the day.
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
        tokenizer: a transformers tokenizer.
        source: the Jinja template.
        has_markers: the template marks what the assistant generates, with `{% generation %}`.
        special: matches the text of one special token.
        turn_end: matches white space followed by the text of one special token.
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
        """Reads the template of a transformers tokenizer; raises DataError if there is none."""
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
        # Alternatives of a pattern are tried in order: a token that begins with another must come first.
        longest_first = sorted(special.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        numbers = np.fromiter(sorted(special), np.int64)
        turn_end = re.compile(rf"\s*(?:{pattern})")
        return cls(tokenizer, source, marked and tokenizer.is_fast, re.compile(pattern), turn_end, numbers)

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Renders a conversation as text; with `prompt`, up to where the assistant's next answer starts.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        text: str = self.tokenizer.apply_chat_template(
            [message.to_input() for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            date_string=FIXED_DATE,
        )
        return text

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokenizes a prompt up to where the assistant's answer starts; raises DataError if the template refuses it."""
        try:
            return self._tokens(self.render(messages, prompt=True))
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses a prompt: {error}") from None

    def thinks_by_default(self) -> bool | None:
        """Whether a prompt asks for reasoning by default; None if the template has no such switch.

        The switch is `enable_thinking` in most templates and `thinking` in some; templates ignore unknown switches.
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
        """Encodes a conversation as one row of at most `max_tokens`, or returns the reason why it cannot be used.

        The mask comes from the template's generation markers, if it has any. Otherwise an assistant turn is the text
        that follows the rendered prompt for it, up to and including its end-of-turn token.
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
            [message.to_input() for message in conversation.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            date_string=FIXED_DATE,
        )
        ids, mask = np.array(row["input_ids"], np.int32), np.array(row["assistant_masks"], np.bool_)
        special = np.isin(ids, self.special_ids)
        if not special[mask].any():
            # The markers surround the content only. A speculator must learn where a turn ends, so supervise the special
            # token that follows, too.
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
        """Locates the answer to `prompt` in `text`: from its first character to the end of its end-of-turn token."""
        if not text.startswith(prompt):
            return REWRITES_HISTORY
        start = len(prompt)
        at = text.find(answer.strip(), start)
        # A special token before the match means that it is the answer of a later turn.
        if at < 0 or self.special.search(text, start, at):
            return REWRITES_ANSWER
        end = at + len(answer.strip())
        turn_end = self.turn_end.match(text, end)
        return start, turn_end.end() if turn_end else end

    def _masked(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        row = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        starts, ends = np.array(row["offset_mapping"], np.int64).reshape(-1, 2).T
        mask = np.zeros(len(starts), np.bool_)
        for start, end in spans:
            # `ends > start`: some tokenizers trim the blank before an answer to an empty span at the answer's start,
            # which must not be supervised.
            mask |= (starts >= start) & (ends > start) & (starts < end)
        return np.array(row["input_ids"], np.int32), mask

    def _masked_by_prefix(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray] | str:
        """Does the same for tokenizers without offsets, by tokenizing the text up to each place."""
        ids = self._tokens(text)
        mask = np.zeros(len(ids), np.bool_)
        for span in spans:
            heads = [self._tokens(text[:place]) for place in span]
            if any(ids[: len(head)] != head for head in heads):
                return NOT_AT_TOKEN
            mask[len(heads[0]) : len(heads[1])] = True
        return np.array(ids, np.int32), mask

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
