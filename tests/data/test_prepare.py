"""The stage `prepare`: a folder that is whole or not there, with counts, reasons and no leak."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from data_toys import VOCAB, row, section, some_rows

from speculators.data import prepare as module
from speculators.data.conversations import parse, prompt_key
from speculators.data.encoded import Conversations
from speculators.data.prepare import loss_warnings, prepare
from speculators.data.template import ChatTemplate
from speculators.errors import ArtifactError, DataError
from speculators.recipe.input_sections import DataSection, DataSource


@pytest.fixture
def run(tokenizer, tmp_path):
    def prepared(data: DataSection, **keys) -> Conversations:
        arguments = {"folder": tmp_path / "out", "vocab_size": VOCAB, "base": tmp_path, **keys}
        return prepare(data, tokenizer=tokenizer, **arguments)

    return prepared


def test_rows_come_back_as_they_were_encoded(run, jsonl, tokenizer):
    """Each prepared row equals its conversation's encoding, and lengths and counts agree with the rows."""
    rows = some_rows(12)
    prepared = run(section(jsonl(rows)))
    template = ChatTemplate.of(tokenizer)
    counts = np.zeros(VOCAB, np.int64)
    assert len(prepared) == 12
    for index, raw in enumerate(rows):
        (want,), got = template.encode(parse(raw, "x"), 2048), prepared.row(index)
        np.testing.assert_array_equal(got.input_ids, want.input_ids)
        np.testing.assert_array_equal(got.loss_mask, want.loss_mask)
        assert prepared.lengths[index] == len(want.input_ids)
        assert prepared.supervised[index] == want.loss_mask.sum()
        counts += np.bincount(want.input_ids[want.loss_mask], minlength=VOCAB)
    np.testing.assert_array_equal(prepared.token_counts(), counts)
    assert prepared.ids() == [f"row{k}" for k in range(12)]


def test_reasons_and_truncations_are_counted(run, jsonl):
    """Skipped rows are counted by reason, truncated rows are counted, and the rest is prepared."""
    rows = [*some_rows(5), row("a"), {"x": 1}, row("q" * 200, "late"), row("q", "word " * 100)]
    prepared = run(section(jsonl(rows), max_tokens=80))
    assert prepared.skipped == {"no assistant turn": 1, "no messages": 1, "no supervised token within max_tokens": 1}
    assert prepared.truncated == 1
    assert prepared.lengths.max() == 80
    assert len(prepared) == 6


def test_end_of_turn_tokens_are_known(run, jsonl, tokenizer):
    """The special tokens that end supervised turns are recorded for the draft vocabulary."""
    assert run(section(jsonl(some_rows(3)))).turn_ends == (tokenizer.eos_token_id,)


def test_sources_are_concatenated_in_order(run, jsonl):
    """Several sources follow each other as the recipe lists them, each with its own take."""
    one, two = jsonl(some_rows(4), "one.jsonl"), jsonl([row("z", "y", id="other")], "two.jsonl")
    prepared = run(DataSection(sources=(DataSource(path=str(one), take=2), DataSource(path=str(two)))))
    assert prepared.ids() == ["row0", "row1", "other"]
    assert [source["usable"] for source in prepared.manifest["sources"]] == [2, 1]


def test_fingerprint_is_of_the_content(run, jsonl, tmp_path):
    """The same conversations under another file name have the same fingerprint; other conversations have another."""
    one = run(section(jsonl(some_rows(4), "one.jsonl")), folder=tmp_path / "1")
    two = run(section(jsonl(some_rows(4), "two.jsonl")), folder=tmp_path / "2")
    three = run(section(jsonl(some_rows(5), "two.jsonl")), folder=tmp_path / "3")
    assert one.fingerprint == two.fingerprint != three.fingerprint


def test_leaked_benchmark_prompts_stop_the_run(run, jsonl, tmp_path):
    """Conversations that start with a benchmark prompt, however spelt, raise an error that counts and names them."""
    held_out = {prompt_key("  QUESTION 2?"), prompt_key("question 3?"), prompt_key("never asked")}
    with pytest.raises(DataError, match="2 of 6 conversations start with a prompt of the benchmark: row2, row3"):
        run(section(jsonl(some_rows(6))), held_out=held_out)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% generation %}all{% endgeneration %}", r"no conversation .*: 3 every token is supervised.*\n.*markers"),
        ("none{% generation %}{% endgeneration %}", r"no conversation .*: 3 no token is supervised.*\n.*markers"),
        ("{{ raise_exception('never') }}", r"3 the chat template refuses it: never"),
    ],
)
def test_useless_masks_everywhere_explain_themselves(run, jsonl, tokenizer, tmp_path, template, said):
    """If every mask is all ones or all zeros, or the template refuses every row, the error says so; nothing is left."""
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said):
        run(section(jsonl(some_rows(3))))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("lost", "warned"), [(1, False), (2, True), (10, True)])
def test_losing_more_than_a_few_conversations_is_warned_of(run, jsonl, lost, warned):
    """A twentieth of the rows may be left out; above that, a warning gives reasons, consequence and cure."""
    too_long = [row("q" * 2000, "late") for _ in range(lost)]
    prepared = run(section(jsonl([*some_rows(20 - lost), *too_long]), max_tokens=100))
    assert sum(prepared.skipped.values()) == lost
    said = f"{lost} of 20 conversations ({lost / 20:.0%}) are not trained on: {lost} no supervised token"
    cure = "the draft learns only from the others, which may not be representative: raise data.max_tokens"
    assert [said in each and cure in each for each in loss_warnings(prepared)] == [True] * warned


def test_losing_most_conversations_is_an_error_unless_the_recipe_allows_it(run, jsonl, tmp_path):
    """If more than half of the rows are left out, nothing is trained on the rest, unless data.allow_lost is larger."""
    rows = jsonl([*some_rows(1), *[row("q" * 2000, "late") for _ in range(19)]])
    with pytest.raises(DataError, match=r"19 of 20 conversations cannot be trained on, .*\n.*data\.allow_lost = 1\.0"):
        run(section(rows, max_tokens=100))
    assert not list(tmp_path.glob("out*"))
    assert len(run(section(rows, max_tokens=100, allow_lost=1.0))) == 1


def test_rows_of_one_conversation_are_named_after_it(run, jsonl, tokenizer):
    """A conversation that needs several rows counts once, and its rows are called id#1, id#2."""
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    prepared = run(section(jsonl([row("a", "b", "c", "d", id="two"), row("a", "b", id="one")])))
    assert prepared.ids() == ["two#1", "two#2", "one"]
    assert (len(prepared), prepared.conversations) == (3, 2)


def test_names_are_read_one_by_one(run, jsonl):
    """Names of chosen rows are read without the others, whatever their length and characters."""
    rows = [row("q", "a", id=name) for name in ("", "é€", "the third one", "")]
    prepared = run(section(jsonl(rows)))
    assert prepared.ids() == ["", "é€", "the third one", ""]
    assert prepared.names([3, 1, 2, 0]) == ("", "é€", "the third one", "")


def test_too_short_rows_name_the_setting(run, jsonl):
    """If max_tokens cuts every answer away, the error names max_tokens."""
    with pytest.raises(DataError, match=r"raise data\.max_tokens"):
        run(section(jsonl(some_rows(3)), max_tokens=4))


def test_tokens_outside_of_the_vocabulary(run, jsonl):
    """A tokenizer of another model is noticed here, not in an embedding look-up."""
    with pytest.raises(DataError, match="the verifier's vocabulary has only 100 tokens"):
        run(section(jsonl(some_rows(3))), vocab_size=100)


def test_full_disk_leaves_nothing_behind(run, jsonl, tmp_path, monkeypatch):
    """A full disk raises one clear error, and neither a folder nor a part of one is left."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(ArtifactError, match=r"out: the disk is full\n.*free some space"):
        run(section(jsonl(some_rows(3))))
    assert not list(tmp_path.glob("out*"))


def test_interrupt_keeps_the_former_folder(run, jsonl, tmp_path, monkeypatch):
    """Ctrl-C while a folder is being rebuilt leaves the old one as it was."""
    before = run(section(jsonl(some_rows(3))))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(section(jsonl(some_rows(4))))
    assert Conversations.open(tmp_path / "out").fingerprint == before.fingerprint
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_open_finds_damage(run, jsonl, tmp_path):
    """A missing manifest, a truncated file, altered content and a foreign key each have their own error."""
    run(section(jsonl(some_rows(3))), key="abc")
    out = tmp_path / "out"
    assert len(Conversations.open(out, key="abc", verify=True)) == 3
    with pytest.raises(ArtifactError, match="made for different inputs"):
        Conversations.open(out, key="abd")
    content = (out / "tokens.i32").read_bytes()
    (out / "tokens.i32").write_bytes(b"\7" + content[1:])
    assert len(Conversations.open(out)) == 3
    with pytest.raises(ArtifactError, match=r"tokens\.i32: not what was written"):
        Conversations.open(out, verify=True)
    (out / "tokens.i32").write_bytes(content[:-4])
    with pytest.raises(ArtifactError, match=r"tokens\.i32: not what was written"):
        Conversations.open(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json: damaged"):
        Conversations.open(out)
    (out / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"not complete: it has no manifest\.json"):
        Conversations.open(out)


def test_progress_is_reported(run, jsonl):
    """The stage reports how many conversations it has read."""
    events = []
    run(section(jsonl(some_rows(250))), progress=events.append)
    assert [event.done for event in events] == [100, 200, 250]
    assert events[-1].total == 250
