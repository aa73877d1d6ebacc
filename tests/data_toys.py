"""Small conversations and stand-ins for the tests of the data layer."""

from __future__ import annotations

from pathlib import Path

import torch

from speculators.data.messages import Conversation, Message
from speculators.recipe.input_sections import DataSection, DataSource

VOCAB = 320
WORDS = ["the", "rain", "in", "spain", "stays", "on", "a", "plain", "and", "then", "it", "goes", "to", "town", "again"]


def talk(*contents: str, system: str | None = None, name: str = "c") -> Conversation:
    """Makes a conversation of alternating turns that starts with the user."""
    messages = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(contents)]
    head = [Message("system", system)] if system is not None else []
    return Conversation(name, "", (*head, *messages))


def row(*contents: str, **fields) -> dict:
    """Makes the same conversation as a row of a JSONL file."""
    return {"messages": [message.to_input() for message in talk(*contents).messages], **fields}


def some_rows(count: int) -> list[dict]:
    """Makes rows of different lengths with different prompts."""
    texts = [" ".join(WORDS[(k * 7 + i) % len(WORDS)] for i in range(1 + k % 11)) for k in range(count)]
    return [row(f"question {k}?", text, id=f"row{k}") for k, text in enumerate(texts)]


def section(path: Path, **keys) -> DataSection:
    """Makes a data section with one source."""
    return DataSection(sources=(DataSource(path=str(path)),), **keys)


def fake_capture(rows: list[torch.Tensor]):
    """Fakes states that depend only on a row's tokens, as a verifier's would: columns 0..5 and 0..2, longest row
    first."""
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        ids = rows[place].float()
        steps = torch.arange(len(ids)).float()
        columns = torch.stack([ids, steps, ids + steps, ids - steps, ids * 0 + len(ids), ids * 2], dim=1)
        yield place, columns, columns[:, :3] + 1
