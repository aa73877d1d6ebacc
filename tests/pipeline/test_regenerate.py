"""`regenerate` reads prompts, leaves out unusable rows, and reuses stored answers only if they are intact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speculators.events import WarningEvent
from speculators.files.disk import file_sha256
from speculators.pipeline import regenerate
from speculators.pipeline.regenerate import LeftOut, is_whole, read_prompts, regenerated
from speculators.recipe.input_sections import DataSection, DataSource, Regenerate
from speculators.runs.places import Places

QUESTION, OTHER = ({"role": "user", "content": text} for text in ("What is a tree?", "And a bush?"))
ANSWER = {"role": "assistant", "content": "A plant."}


def rows_file(folder: Path, *rows: Any) -> DataSource:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(folder / "rows.jsonl"))


def test_sharegpt_rows_are_read_as_messages(tmp_path: Path) -> None:
    """Rows with `conversations` of from and value are accepted; they are written with messages and keep their ids."""
    turns = [{"from": "human", "value": "What is a tree?"}, {"from": "gpt", "value": "A plant."}]
    source = rows_file(tmp_path, {"id": "a", "conversations": turns}, {"messages": [QUESTION, ANSWER]})
    assert read_prompts(source, LeftOut()) == [{"id": "a", "messages": [QUESTION]}, {"messages": [QUESTION]}]


def test_conversations_that_are_cut_to_their_first_question_are_counted(tmp_path: Path) -> None:
    """The count and the reason are reported; conversations with one question do not count."""
    source = rows_file(tmp_path, *({"messages": [QUESTION, ANSWER, OTHER, ANSWER][:end]} for end in (1, 2, 3, 4)))
    left_out = LeftOut()
    assert [row["messages"] for row in read_prompts(source, left_out)] == [[QUESTION]] * 4
    (sentence,) = left_out.sentences()
    assert sentence.startswith("2 conversations have several user turns: only their first")


def test_rows_of_a_data_set_that_cannot_be_used_are_counted_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unusable rows are missing from the prompts, but appear in the report."""
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}, {"messages": []}, {"messages": [OTHER]}]
    monkeypatch.setattr("speculators.data.conversations._dataset_rows", lambda source, path: enumerate(rows))
    left_out = LeftOut()
    assert len(read_prompts(DataSource(path="owner/set"), left_out)) == 1
    assert left_out.skipped == Counter({"no assistant turn": 2, "no messages": 1})
    assert left_out.sentences() == ["3 rows cannot be used and get no answer: 2 no assistant turn, 1 no messages"]


@pytest.mark.parametrize("damage", ["none", "changed", "no provenance"])
def test_stored_answers_are_reused_only_if_they_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Stored answers are checked against the sha256 beside them; if it differs, they are generated again with a
    warning."""
    file = Places(cache=tmp_path).answers("f" * 64)
    file.parent.mkdir()
    file.write_text("{}\n")
    provenance = file.with_name(file.name + ".json")
    provenance.write_text(json.dumps({"sha256": file_sha256(file)}))
    if damage == "changed":
        file.write_text('{"changed": 1}\n')
    if damage == "no provenance":
        provenance.unlink()
    made: list[Path] = []
    events: list[Any] = []
    monkeypatch.setattr(regenerate, "write_answers", lambda *_, **__: made.append(file))
    data = DataSection(sources=(rows_file(tmp_path, {"messages": [QUESTION]}),), regenerate=Regenerate())
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(data=data, verifier=SimpleNamespace(dtype="float32")),
        plan=SimpleNamespace(stage=lambda name: SimpleNamespace(fingerprint="f" * 64)),
        places=Places(cache=tmp_path),
        engine=lambda dtype: None,
        emit=events.append,
    )
    assert regenerated(context).sources == (DataSource(path=str(file)),)
    assert is_whole(file) == (damage == "none")
    assert made == ([] if damage == "none" else [file])
    warnings = [event.message for event in events if isinstance(event, WarningEvent)]
    assert len(warnings) == (0 if damage == "none" else 1)
    assert all(str(file) in message for message in warnings)
