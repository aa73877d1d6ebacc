"""Brings a row into the layout of conversations by the `map` of its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators.data.json_rows import Unusable
from speculators.data.messages import Conversation
from speculators.recipe.field_map import FieldMap, fields_of, fill

# What other people call the parts of a conversation, to suggest a map where a source has none.
_CALLED = {
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input"),
    "completion": ("completion", "answer", "response", "output", "solution", "chosen"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("text", "content"),
}


def map_row(fields: FieldMap, row: Any, name: str) -> dict[str, Any] | Conversation | Unusable:
    """Reads the mapped fields of a row: as a row with `messages`, or for plain text as a conversation of it alone.

    Args:
        name: the id for a row without one.
    """
    if not isinstance(row, Mapping):
        return Unusable("not a JSON object")
    parts: dict[str, Any] = {}
    for part, value in fields.present().items():
        if lacking := [field for field in fields_of(value) if field not in row]:
            return Unusable(f"no field {lacking[0]!r}")
        parts[part] = fill(value, row)
    for part in ("prompt", "completion", "system", "text"):
        if part in parts and not isinstance(parts[part], str):
            return Unusable(f"its {part} is not text")
    # What is not mapped keeps its usual name.
    common = {key: row[key] for key in ("tools", "documents", "id", "category") if row.get(key) is not None}
    common |= {key: parts[key] for key in ("tools", "documents", "id", "category") if key in parts}
    if "text" in parts:
        return _plain(parts["text"], str(common.get("id", name)), str(common.get("category", "")))
    for part in ("messages", "turns"):
        if part in parts:
            return {**common, part: parts[part]}
    if "prompt" in parts:
        return {**common, "messages": _turns(parts)}
    return {**row, **common}


def _plain(text: str, name: str, category: str) -> Conversation | Unusable:
    return Conversation(name, category, (), text=text) if text.strip() else Unusable("an empty text")


def _turns(parts: Mapping[str, str]) -> list[dict[str, str]]:
    roles = {"system": "system", "prompt": "user", "completion": "assistant"}
    turns = [{"role": role, "content": parts[part]} for part, role in roles.items() if part in parts]
    # Many data sets leave the system message empty where there is none.
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def suggest_map(row: Any) -> str:
    """Suggests a `map` for a row without messages by the names of its fields; "" if none is familiar."""
    if not isinstance(row, Mapping):
        return ""
    known = {part: next((name for name in names if name in row), None) for part, names in _CALLED.items()}
    for parts in (("prompt", "completion"), ("messages",), ("text",)):
        if all(known[part] for part in parts):
            pairs = ", ".join(f'{part} = "{known[part]}"' for part in parts)
            return f"its rows have the fields {', '.join(map(str, row))}: try map = {{ {pairs} }}"
    return ""
