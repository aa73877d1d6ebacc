"""`spec data` says how rows are trained on that a `map` reads."""

from __future__ import annotations

from speculators.inspection.mapped import mapped_rows
from speculators.recipe.field_map import FieldMap
from speculators.recipe.input_sections import DataSource


def test_plain_text_and_prompts_are_explained():
    """What is supervised differs between them; conversations need no explanation."""
    sources = [
        DataSource(path="a.jsonl", map=FieldMap(text="body")),
        DataSource(path="b.jsonl", map=FieldMap(prompt="q", completion="a")),
        DataSource(path="c.jsonl", map=FieldMap(prompt="q")),
        DataSource(path="d.jsonl", map=FieldMap(messages="m")),
        DataSource(path="e.jsonl"),
    ]
    text, both, prompts = [note.message for note in mapped_rows(sources, {"a.jsonl": 7, "b.jsonl": 3})]
    assert "7 rows are plain text: no chat template is applied, every token is supervised but the first" in text
    assert "3 rows become a user's turn and the assistant's answer, rendered with the chat template" in both
    assert "0 rows become a user's turn, rendered" in prompts
