"""Reads the ids of answers that a verifier wrote, which a row keeps beside its text, and checks whose ids they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from speculators.data.messages import Message, Written

TOKEN_IDS = "token_ids"
BAD_IDS = 'token_ids are not a list of {"turn": .., "prompt": [..], "answer": [..]} whose turns are the assistant\'s'
OTHER_TOKENIZER = "token_ids were written with another tokenizer: decoded with this one, they are not the row's text"


def read_written(row: Mapping[str, Any], messages: Sequence[Message]) -> tuple[Written, ...] | str:
    """Reads `token_ids` of a row, in order; returns the reason where they do not fit its messages."""
    values = row.get(TOKEN_IDS)
    if values is None:
        return ()
    if not isinstance(values, list):
        return BAD_IDS
    written: list[Written] = []
    for value in values:
        entry = _entry(value)
        if entry is None or entry.turn >= len(messages) or messages[entry.turn].role != "assistant":
            return BAD_IDS
        if written and entry.turn <= written[-1].turn:
            return BAD_IDS
        written.append(entry)
    return tuple(written)


def written_turns(row: Mapping[str, Any]) -> set[int]:
    """Lists the turns of a row that came with ids, before `read_written` checks them."""
    values = row.get(TOKEN_IDS)
    turns = [value.get("turn") for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []
    return {turn for turn in turns if _is_id(turn)}


def _entry(value: Any) -> Written | None:
    if not isinstance(value, Mapping):
        return None
    turn, prompt, answer, text = (value.get(key) for key in ("turn", "prompt", "answer", "text"))
    if not _is_id(turn) or not _are_ids(prompt) or not _are_ids(answer) or not isinstance(text, str | None):
        return None
    return Written(turn=turn, prompt=tuple(prompt), answer=tuple(answer), text=text)


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _is_id(value: Any) -> TypeGuard[int]:
    # JSON's true is an int to Python.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def written_values(written: Written) -> dict[str, Any]:
    """Writes an entry of `token_ids`."""
    return {
        "turn": written.turn,
        "prompt": list(written.prompt),
        "answer": list(written.answer),
        "text": written.text,
    }


def exact_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes ids without leaving anything out: special tokens and blanks stay."""
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )
    return text


def from_other_tokenizer(tokenizer: Any, written: Sequence[Written]) -> bool:
    """Whether some answer's ids do not mean its text to this tokenizer, which would train on nonsense."""
    return any(each.text is not None and exact_text(tokenizer, each.answer) != each.text for each in written)
