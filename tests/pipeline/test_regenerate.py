"""`regenerate` writes every answer anew on the verifier's own history, keeps its ids, and reuses only intact files."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

from speculators.data.conversations import parse
from speculators.data.messages import Conversation
from speculators.data.sources import SourceRow
from speculators.data.template import ChatTemplate
from speculators.errors import DataError, RecipeError
from speculators.events import WarningEvent
from speculators.files.disk import file_sha256
from speculators.pipeline import regenerate
from speculators.pipeline.dialogues import AnswerTurn, Dialogue, LeftOut, stream_dialogues
from speculators.pipeline.journal import AnswerJournal
from speculators.pipeline.regenerate import is_whole, regenerated, write_answers
from speculators.recipe.fingerprint import source_identity
from speculators.recipe.input_sections import DataSection, DataSource, Regenerate
from speculators.runs.places import Places
from speculators.training.world import World
from speculators.verifier.generate import Sampling

QUESTION, OTHER = ({"role": "user", "content": text} for text in ("What is a tree?", "And a bush?"))
ANSWER = {"role": "assistant", "content": "A plant."}
LENGTHY = 10_000


def rows_file(folder: Path, *rows: Any) -> DataSource:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(folder / "rows.jsonl"))


def read(source: DataSource, left_out: LeftOut | None = None) -> list[Dialogue]:
    return list(stream_dialogues(source, left_out or LeftOut()))


@attrs.define
class Scripted:
    """A verifier that answers `answer(text of the prompt)`, and remembers what it was asked."""

    tokenizer: Any
    answer: Any
    asked: list[str] = attrs.field(factory=list)
    fails_after: int = LENGTHY
    stop_ids: tuple[int, ...] = (2,)

    def generate_batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, done: Any, progress: Any
    ) -> Iterator[tuple[tuple[int, ...], list[list[int]]]]:
        for index, prompt in enumerate(prompts):
            if index in done:
                continue
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(self.tokenizer.decode(prompt))
            yield (index,), [self.tokenizer(self.answer(self.asked[-1]), add_special_tokens=False)["input_ids"]]


def written(file: Path, dialogues: list[Dialogue], verifier: Scripted, **options: Any) -> list[dict[str, Any]]:
    """The rows that the scripted verifier writes to a file."""
    settings = {"max_tokens": LENGTHY, "facts": lambda prompt: {"verifier": "scripted"}, "listen": lambda event: None}
    write_answers(file, dialogues, verifier, Regenerate(), **(settings | options))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_sharegpt_rows_are_read_as_messages(tmp_path: Path) -> None:
    """Rows with `conversations` of from and value are accepted; they keep their ids and other fields."""
    turns = [{"from": "human", "value": "What is a tree?"}, {"from": "gpt", "value": "A plant."}]
    first, second = read(
        rows_file(tmp_path, {"id": "a", "split": "train", "conversations": turns}, {"messages": [QUESTION]})
    )
    assert first.row == {"id": "a", "split": "train"}
    assert [message.content for message in first.messages_before(0)] == [QUESTION["content"]]
    assert [dialogue.turns for dialogue in (first, second)] == [(AnswerTurn(1, 2, kept=False),)] * 2


def test_every_answer_is_written_on_the_verifiers_own_history(tokenizer: Any, tmp_path: Path) -> None:
    """The second prompt holds the verifier's first answer, not the data's; ids and text of both are kept."""
    verifier = Scripted(tokenizer, lambda prompt: ("Leaves." if "bush" in prompt else "Wood.") + "<|im_end|>")
    (row,) = written(
        tmp_path / "new.jsonl",
        read(rows_file(tmp_path, {"messages": [QUESTION, ANSWER, OTHER, ANSWER]})),
        verifier,
    )
    assert [message["content"] for message in row["messages"]] == ["What is a tree?", "Wood.", "And a bush?", "Leaves."]
    assert "A plant." not in "".join(verifier.asked)
    assert [entry["turn"] for entry in row["token_ids"]] == [1, 3]
    assert [entry["text"] for entry in row["token_ids"]] == ["Wood.<|im_end|>", "Leaves.<|im_end|>"]
    assert [tokenizer.decode(entry["prompt"]) for entry in row["token_ids"]] == verifier.asked
    conversation = parse(row, "name")
    assert isinstance(conversation, Conversation)
    (encoded,) = ChatTemplate.of(tokenizer).encode(conversation, LENGTHY)
    assert tokenizer.decode(encoded.input_ids[encoded.loss_mask]) == "Wood.<|im_end|>Leaves.<|im_end|>"


def test_the_tools_of_a_hermes_prompt_are_kept(tokenizer: Any, tmp_path: Path) -> None:
    """They stand in the system turn of the row, and in a field of their own in the file of answers."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    prompt = f"You are a function calling AI model. <tools> {json.dumps([tool])} </tools>"
    turns = [{"from": "system", "value": prompt}, {"from": "human", "value": "Is it wet?"}]
    (row,) = written(
        tmp_path / "new.jsonl",
        read(rows_file(tmp_path, {"conversations": turns})),
        Scripted(tokenizer, lambda prompt: "Yes.<|im_end|>"),
    )
    assert row["tools"] == [tool]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_the_calls_that_a_result_answers_stay_in_the_history(tokenizer: Any, tmp_path: Path) -> None:
    """The verifier's own call is trained on at its place; a run of assistant turns is answered once."""
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": "Let me look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It is"},
        {"role": "assistant", "content": "wet."},
    ]
    (row,) = written(
        tmp_path / "new.jsonl",
        read(rows_file(tmp_path, {"messages": messages})),
        Scripted(tokenizer, lambda prompt: ("Dry." if "rain" in prompt else "I call.") + "<|im_end|>"),
    )
    assert [message["content"] for message in row["messages"][1:]] == ["Let me look.", "", "rain", "Dry."]
    assert row["messages"][2]["tool_calls"][0]["function"] == call["function"]
    assert [(entry["turn"], entry["text"]) for entry in row["token_ids"]] == [
        (1, "I call.<|im_end|>"),
        (4, "Dry.<|im_end|>"),
    ]


def test_a_question_at_the_end_is_answered_too(tokenizer: Any, tmp_path: Path) -> None:
    """Prompts need no answers; those that they have are replaced."""
    (row,) = written(
        tmp_path / "new.jsonl",
        read(rows_file(tmp_path, {"messages": [QUESTION, ANSWER, OTHER]})),
        Scripted(tokenizer, lambda prompt: "Yes.<|im_end|>"),
    )
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in row["messages"][1::2]] == ["Yes."] * 2


def test_rows_of_a_data_set_that_cannot_be_used_are_counted_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unusable rows are missing from the prompts, but appear in the report."""
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [ANSWER]}, {"messages": []}, {"messages": [OTHER]}]
    source_rows = [SourceRow(name=f"{n}", place=f"{n}", written=value, value=value) for n, value in enumerate(rows)]
    monkeypatch.setattr("speculators.pipeline.dialogues.source_rows", lambda source, base: source_rows)
    left_out = LeftOut()
    assert len(read(DataSource(path="owner/set"), left_out)) == 2
    assert left_out.skipped == Counter({"no user turn to answer": 1, "not a JSON object with messages": 1})
    assert left_out.sentences() == [
        "2 rows cannot be used and get no answer: 1 no user turn to answer, 1 not a JSON object with messages"
    ]


def test_a_conversation_that_grows_too_long_ends_with_its_last_answer(tokenizer: Any, tmp_path: Path) -> None:
    """Nothing of a later answer could be trained on; the reader is warned, and the other conversations go on."""
    events: list[Any] = []
    verifier = Scripted(tokenizer, lambda prompt: ("long " * 60 if "tree" in prompt else "No.") + "<|im_end|>")
    rows = [{"messages": [first, ANSWER, OTHER, ANSWER]} for first in (QUESTION, OTHER)]
    long, short = written(
        tmp_path / "new.jsonl", read(rows_file(tmp_path, *rows)), verifier, max_tokens=150, listen=events.append
    )
    assert [len(row["messages"]) for row in (long, short)] == [2, 4]
    (message,) = [event.message for event in events if isinstance(event, WarningEvent)]
    assert message.startswith("1 conversations end early: their next prompt has data.max_tokens = 150")


def test_a_conversation_that_the_template_refuses_is_left_out_before_anything_is_generated(
    tokenizer: Any, tmp_path: Path
) -> None:
    """An hour of answers must not end in an error that was there from the beginning; some refused rows are a warning,
    and nothing left is an error."""
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + tokenizer.chat_template
    )
    events: list[Any] = []
    verifier = Scripted(tokenizer, lambda prompt: "Yes.<|im_end|>")
    long, short = {"messages": [QUESTION, ANSWER, OTHER]}, {"messages": [QUESTION]}
    (row,) = written(tmp_path / "new.jsonl", read(rows_file(tmp_path, long, short)), verifier, listen=events.append)
    assert [message["content"] for message in row["messages"]] == ["What is a tree?", "Yes."]
    (warning,) = [event.message for event in events if isinstance(event, WarningEvent)]
    assert warning.startswith("1 conversations are left out: ")
    assert "rows.jsonl:1: the chat template refuses a prompt: one question only" in warning
    verifier.asked.clear()
    with pytest.raises(DataError, match=r"no conversation can be answered(.|\n)*one question only"):
        written(tmp_path / "none.jsonl", read(rows_file(tmp_path, long)), verifier)
    assert not verifier.asked


def test_a_killed_run_asks_only_for_what_is_missing(tokenizer: Any, tmp_path: Path) -> None:
    """Answers are appended as they come; a last line that the kill has torn is made again, and the file is the same."""
    dialogues = read(rows_file(tmp_path, *[{"messages": [QUESTION, ANSWER, OTHER]}] * 2))

    def answer(prompt: str) -> str:
        return f"{len(prompt)}<|im_end|>"

    whole = written(tmp_path / "whole.jsonl", dialogues, Scripted(tokenizer, answer))
    new, part = tmp_path / "new.jsonl", tmp_path / "new.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        written(new, dialogues, Scripted(tokenizer, answer, fails_after=3))
    part.write_bytes(part.read_bytes()[:-4])
    rest = Scripted(tokenizer, answer)
    assert written(new, dialogues, rest) == whole
    assert len(rest.asked) == 2
    assert not part.exists()
    done = Scripted(tokenizer, answer)
    assert written(new, dialogues, done) == whole
    assert not done.asked


def test_the_answers_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    """A file with other facts is replaced; what the same facts determine is read back, in any number of steps."""
    part = tmp_path / "answers.part"
    journal = AnswerJournal(part, {"seed": 1})
    journal.add([((0, 0), [5, 6]), ((1, 0), [7])])
    AnswerJournal(part, {"seed": 1}).add([((0, 1), [8])])
    assert dict(AnswerJournal(part, {"seed": 1})) == {(0, 0): [5, 6], (1, 0): [7], (0, 1): [8]}
    assert not AnswerJournal.has(part, {"seed": 2})
    assert dict(AnswerJournal(part, {"seed": 2})) == {}


def test_answers_stay_on_the_disk(tmp_path: Path) -> None:
    """A journal holds a few bytes for each answer, whatever its length, both while it grows and when it is resumed."""
    tracemalloc.start()
    journal, answer = AnswerJournal(tmp_path / "answers.part", {}), list(range(1000, 3000))
    for row in range(50):
        journal.add([((row, 0), list(answer))])
    resumed = AnswerJournal(tmp_path / "answers.part", {})
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert journal[49, 0] == resumed[49, 0] == answer
    # One copy of the ids alone takes eight times that many bytes.
    assert kept < 50 * len(answer) + sys.getsizeof(1000) * len(answer)


def test_the_verifier_answers_on_the_gpu_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`spec regenerate` loads the verifier where the process computes, as `spec run` does."""
    devices: list[torch.device] = []

    def engine(folder: Path, *, device: torch.device, **_: Any) -> None:
        devices.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(regenerate, "obtain", lambda section, progress: tmp_path)
    monkeypatch.setattr(regenerate, "Engine", engine)
    data = DataSection(sources=(rows_file(tmp_path, {"messages": [QUESTION]}),))
    recipe: Any = SimpleNamespace(data=data, verifier=SimpleNamespace(dtype="float32"))
    with pytest.raises(KeyboardInterrupt):
        regenerate.regenerate_file(recipe, None, tmp_path / "new.jsonl", progress=lambda event: None)
    assert devices == [torch.device("cuda", 0)]


def test_a_finished_file_of_other_prompts_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """A later turn that differs makes other answers."""
    file, verifier = tmp_path / "new.jsonl", Scripted(tokenizer, lambda prompt: "Yes.<|im_end|>")
    before = written(file, read(rows_file(tmp_path, {"messages": [QUESTION, ANSWER, OTHER]})), verifier)
    with pytest.raises(RecipeError, match="exists, with other answers"):
        written(file, read(rows_file(tmp_path, {"messages": [QUESTION, ANSWER, QUESTION]})), verifier)
    assert [json.loads(line) for line in file.read_text().splitlines()] == before


@pytest.mark.parametrize("damage", ["none", "text only", "changed", "no provenance"])
def test_stored_answers_are_reused_only_if_they_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Stored answers are checked against the sha256 beside them; if it differs, they are generated again with a
    warning. Those of earlier versions are used, with a warning that their ids were not kept."""
    file = Places(cache=tmp_path).answers("f" * 64)
    file.parent.mkdir()
    file.write_text("{}\n")
    provenance = file.with_name(file.name + ".json")
    ids = {} if damage == "text only" else {"token_ids": "generated"}
    provenance.write_text(json.dumps({"sha256": file_sha256(file), **ids}))
    if damage == "changed":
        file.write_text('{"changed": 1}\n')
    if damage == "no provenance":
        provenance.unlink()
    made: list[Path] = []
    events: list[Any] = []
    monkeypatch.setattr(regenerate, "write_answers", lambda *_, **__: made.append(file))
    monkeypatch.setattr(regenerate, "engine_facts", lambda _: {})
    data = DataSection(sources=(rows_file(tmp_path, {"messages": [QUESTION]}),), regenerate=Regenerate())
    planned = [source_identity(source) for source in data.sources]
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(data=data, verifier=SimpleNamespace(dtype="float32")),
        plan=SimpleNamespace(stage=lambda name: SimpleNamespace(fingerprint="f" * 64, inputs={"sources": planned})),
        places=Places(cache=tmp_path),
        world=World(),
        lead=lambda dtype: nullcontext(object()),
        emit=events.append,
    )
    assert regenerated(context, events.append).sources == (DataSource(path=str(file)),)
    kept = damage in ("none", "text only")
    assert is_whole(file) == kept
    assert made == ([] if kept else [file])
    warnings = [event.message for event in events if isinstance(event, WarningEvent)]
    assert len(warnings) == (0 if damage == "none" else 1)
    assert all(str(file) in message for message in warnings)
