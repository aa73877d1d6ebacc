"""`map` of a source: which fields of a row hold what a conversation needs."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import field


def _field_or_template(_: object, __: attrs.Attribute[Any], value: str | None) -> None:
    if value is None:
        return
    if not value.strip():
        raise ValueError("must name a field of the rows, got an empty string")
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError as error:  # a brace without its partner
        raise ValueError(f'must be a field\'s name or a text with fields in braces, got "{value}": {error}') from None
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise ValueError(f'braces hold only the name of a field, as in "{{instruction}}\\n\\n{{input}}"; got "{value}"')


def _field(_: object, __: attrs.Attribute[Any], value: str | None) -> None:
    _field_or_template(_, __, value)
    if value is not None and "{" in value:
        raise ValueError(
            f'must be the name of one field, which holds a list, not a text made of several; got "{value}"'
        )


def _text() -> Any:
    return field(default=None, validator=_field_or_template)


def _list() -> Any:
    return field(default=None, validator=_field)


@attrs.frozen(kw_only=True)
class FieldMap:
    """`map` of a source: the field of a row that each part of a conversation is read from.

    A value is the name of a field; texts may also be made of several fields: `"{instruction}\\n\\n{input}"`.

    Attributes:
        messages: the turns, as `messages` or `conversations` have them.
        prompt: the user's turn; with `completion`, it makes a conversation that the chat template renders.
        completion: the assistant's turn.
        system: the system message before `prompt`.
        text: text that is trained on as it stands: no chat template, every token supervised but the first.
        tools: what the assistant may call.
        documents: what a retrieval template shows.
        id: name of the row.
        category: kind of conversation.
    """

    messages: str | None = _list()
    prompt: str | None = _text()
    completion: str | None = _text()
    system: str | None = _text()
    text: str | None = _text()
    tools: str | None = _list()
    documents: str | None = _list()
    id: str | None = _text()
    category: str | None = _text()

    def __attrs_post_init__(self) -> None:
        present = self.present()
        if not present:
            raise ValueError('must name at least one field, as in { prompt = "question", completion = "answer" }')
        for whole, others in _ALONE.items():
            if whole in present and (clash := [name for name in others if name in present]):
                raise ValueError(f"{whole} cannot go with {' and '.join(clash)}: a row is one or the other")
        for part in ("completion", "system"):
            if part in present and "prompt" not in present:
                raise ValueError(f"{part} needs prompt beside it")

    def present(self) -> dict[str, str]:
        """The parts that are mapped, with their fields."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}


@attrs.frozen(kw_only=True)
class SuiteMap(FieldMap):
    """`map` of a suite: `completion` is the suite's own answer, which is used as far as it is the verifier's.

    Attributes:
        turns: the user's questions, a list; each after the first follows the verifier's own answer.
    """

    turns: str | None = _list()


_ALONE = {
    "text": ("messages", "prompt", "completion", "system", "tools", "documents"),
    "messages": ("prompt", "completion", "system"),
    "turns": ("text", "messages", "prompt", "completion", "system"),
}


def fields_of(value: str) -> Iterator[str]:
    """Lists the fields that a value of the map names."""
    if "{" not in value and "}" not in value:
        yield value
        return
    for _, name, _, _ in string.Formatter().parse(value):
        if name is not None:
            yield name


def fill(value: str, row: Mapping[str, Any]) -> Any:
    """Reads a value of the map from a row: the field itself, or the text with its fields filled in.

    A field of a text that is null is empty; white space around the whole text is cut off.
    """
    if "{" not in value and "}" not in value:
        return row[value]
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(value):
        pieces.append(literal)
        if name is not None and row[name] is not None:
            pieces.append(str(row[name]))
    return "".join(pieces).strip()
