"""Streams a decoded answer, with the tokens that were drafted and accepted in colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
from rich.console import Console
from rich.text import Text

from speculators.decoding.loop import Decoded

# What a tokenizer returns for bytes that do not make up a character yet.
_UNFINISHED = "\ufffd"


@attrs.frozen
class AnswerPiece:
    """A part of an answer.

    Attributes:
        text: of some of its tokens.
        drafted: whether they were drafted and accepted; the verifier's own tokens are not.
    """

    text: str
    drafted: bool


@attrs.define
class TokenText:
    """Turns tokens into text as they come; a character may take several tokens.

    Attributes:
        text_of: decodes tokens, without special ones.
    """

    text_of: Callable[[Sequence[int]], str]
    _tokens: list[int] = attrs.field(init=False, factory=list)
    _text: str = attrs.field(init=False, default="")

    def add(self, tokens: Sequence[int], accepted: int) -> list[AnswerPiece]:
        """Adds the tokens of a round, of which the first `accepted` were drafted; returns what can be shown."""
        parts = ((tokens[:accepted], True), (tokens[accepted:], False))
        return [piece for part, drafted in parts if part and (piece := self._piece(part, drafted)).text]

    def rest(self) -> list[AnswerPiece]:
        """Returns what was held back, at the end of the answer."""
        rest = self.text_of(self._tokens)[len(self._text) :]
        return [AnswerPiece(rest, False)] if rest else []

    def _piece(self, tokens: Sequence[int], drafted: bool) -> AnswerPiece:
        self._tokens += tokens
        # Half a character is held back; the round that completes it shows it.
        shown = self.text_of(self._tokens).rstrip(_UNFINISHED)
        new, self._text = shown[len(self._text) :], max(shown, self._text, key=len)
        return AnswerPiece(new, drafted)


class AnswerView:
    """Prints an answer round by round; without a terminal it is plain text.

    Args:
        out: where to print; None only collects the pieces.
        text_of: decodes tokens, without special ones.
    """

    def __init__(self, out: Console | None, text_of: Callable[[Sequence[int]], str]) -> None:
        self.out = out
        self.pieces: list[AnswerPiece] = []
        self._stream = TokenText(text_of)

    def __call__(self, tokens: Sequence[int], accepted: int) -> None:
        """Prints the tokens of a round; see `OnTokens`."""
        self._print(self._stream.add(tokens, accepted))

    def finish(self) -> None:
        """Prints what was held back, and ends the line."""
        self._print(self._stream.rest())
        if self.out is not None:
            self.out.print()

    def _print(self, pieces: Sequence[AnswerPiece]) -> None:
        for piece in pieces:
            self.pieces.append(piece)
            if self.out is None:
                continue
            # The terminal itself wraps: Rich does not know in which column the last piece ended.
            self.out.print(Text(piece.text, style="drafted" if piece.drafted else ""), end="", soft_wrap=True)


def answer_line(decoded: Decoded, k: int) -> Text:
    """Formats the line under an answer: tokens a pass, K, and how many of the tokens were drafted."""
    rounds = decoded.rounds
    if not rounds:
        return Text("one token, from the prompt's own pass: nothing was drafted", style="note")
    # The first token comes from the prompt's pass, which belongs to no round.
    emitted, accepted = (sum(getattr(each, name) for each in rounds) for name in ("emitted", "accepted"))
    speed = len(decoded.tokens) / decoded.seconds
    return Text.assemble(
        (f"{emitted / len(rounds):.2f} tokens a pass, K = {k}: ", "note"),
        (f"{accepted} of {len(decoded.tokens)} tokens drafted", "drafted"),
        (f", {len(rounds)} passes, {speed:.1f} tokens/s", "note"),
    )
