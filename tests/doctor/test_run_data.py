"""Checks of a run's data: another model's answers, a mask of ones, conversations that are too short."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from clinic import RECIPE, TALKS, Clinic, Examined, talk, write_talks
from command import Spec
from safetensors.torch import load_file, save_file

from speculators.files.disk import file_sha256

pytestmark = pytest.mark.slow

ALL_GENERATED = (
    "<|im_start|>{% generation %}{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% endgeneration %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def examined(
    clinic: Clinic, home: Path, conversations: list, *, steps: int, max_tokens: int = 256, verifier: Path | None = None
) -> Examined:
    """Trains a run on these conversations and examines it."""
    spec = Spec(home)
    data = write_talks(home / "data.jsonl", conversations)
    verifier = verifier or clinic.verifier
    text = RECIPE.format(verifier=verifier, data=data, max_tokens=max_tokens, options="", steps=steps)
    (home / "clinic.toml").write_text(text)
    outcome = spec("run", home / "clinic.toml", "--runs", spec.runs, "--quiet")
    assert outcome.code == 0, outcome.err
    (run,) = spec.runs.glob("clinic-*")
    return clinic.examine(run / "speculator", cache=spec.cache)


def test_answers_of_another_model_are_a_warning(clinic: Clinic, tmp_path: Path) -> None:
    """Each question has another question's answer, reversed, which the verifier would never write."""
    foreign = [talk(subject) for subject in TALKS]
    for messages, answer in zip(foreign, reversed(TALKS.values()), strict=True):
        messages[1]["content"] = answer[::-1]
    check = examined(clinic, tmp_path, foreign, steps=2)["data/on-policy"]
    assert check.result == "warning"
    assert check.evidence.startswith("off-policy: ")
    assert "regenerate" in check.todo


def test_skipped_rows_are_a_warning(clinic: Clinic, tmp_path: Path) -> None:
    """A run goes on without them; the doctor says how many there are, and why."""
    talks = [talk(subject) for subject in TALKS]
    check = examined(clinic, tmp_path, [*talks, *([talks[0][0]] * 2 for _ in range(3))], steps=2)["data/lint"]
    assert check.result == "warning"
    assert "rows left out: 3 of 16 rows are left out" in check.evidence
    assert check.todo


def test_a_template_that_thinks_by_default_and_data_that_does_not_are_a_warning(clinic: Clinic, tmp_path: Path) -> None:
    """A server asks for reasoning by default, which the draft has never seen."""
    verifier = Path(shutil.copytree(clinic.verifier, tmp_path / "verifier"))
    template = verifier / "chat_template.jinja"
    thinks = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    template.write_text(template.read_text().replace("assistant\n' }}", f"assistant\n' }}}}{thinks}"))
    check = examined(clinic, tmp_path, [talk(subject) for subject in TALKS], steps=2, verifier=verifier)["data/lint"]
    assert check.result == "warning"
    assert "thinking flag: the chat template asks for reasoning by default" in check.evidence
    assert "enable_thinking = false" in check.todo


def test_a_template_that_marks_the_prompt_supervises_only_the_answer(clinic: Clinic, tmp_path: Path) -> None:
    """Marks reach the loss only after the prompt as it is served, so the doctor finds a part supervised, not all."""
    verifier = Path(shutil.copytree(clinic.verifier, tmp_path / "verifier"))
    (verifier / "chat_template.jinja").write_text(ALL_GENERATED)
    examination = examined(clinic, tmp_path, [talk(subject) for subject in TALKS], steps=2, verifier=verifier)
    assert examination["data/loss mask"].result == "ok"
    share = re.search(r"(\d+)%", examination["data/loss mask"].evidence)
    assert share
    assert 0 < int(share[1]) < 90


def test_acceptance_that_ends_at_the_training_length_is_a_warning(clinic: Clinic, tmp_path: Path) -> None:
    """Trained on single short conversations, the draft is sound within their length and fails beyond it."""
    examination = examined(clinic, tmp_path, [talk(subject) for subject in TALKS], steps=250, max_tokens=96)
    assert examination["alignment/acceptance"].result == "ok"
    beyond = examination["length/beyond training's length"]
    assert beyond.result == "warning", beyond
    assert "acceptance falls from" in beyond.evidence
    assert "data.max_tokens is 96" in beyond.todo


def test_a_run_that_learnt_its_data_by_heart_is_a_warning(clinic: Clinic, tmp_path: Path) -> None:
    """Trained on one conversation over and over, it drafts only that one well."""
    check = examined(clinic, tmp_path, [talk("a tree", "the sea")], steps=250)["data/memorised"]
    assert check.result == "warning", check
    assert "has learnt its data by heart" in check.evidence
    assert check.todo


STORED = {
    "of the token before": (
        lambda states: {name: held.roll(1, dims=0) for name, held in states.items()},
        r"the states of layer 1 are [\d.]+ off",
    ),
    "of other layers": (
        lambda states: {**states, "hidden_states": states["hidden_states"].roll(-32, dims=1)},
        "the states of layer 1 match layer 2's",
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_states_that_are_not_the_verifier_s_are_wrong(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """The run trained on them, and everything else about it looks right: their hashes are of what was captured."""
    change, words = STORED[name]
    cache = Path(shutil.copytree(clinic.cache, tmp_path / "cache"))
    for manifest in cache.glob("states/*/manifest.json"):
        table = json.loads(manifest.read_text())
        for entry in table["shards"]:
            shard = manifest.with_name(entry["file"])
            altered = change(load_file(shard))
            save_file({key: tensor.contiguous() for key, tensor in altered.items()}, shard)
            entry["sha256"] = file_sha256(shard)
            note = shard.with_suffix(".json")
            note.write_text(json.dumps({**json.loads(note.read_text()), "conversations": None}))
        manifest.write_text(json.dumps(table))
    examination = clinic.examine(clinic.run / "speculator", cache=cache)["data/states"]
    assert examination.result == "wrong", examination
    assert re.search(words, examination.evidence), examination.evidence
    assert "--check-states" in examination.todo


def test_stored_states_that_were_altered_are_wrong(clinic: Clinic, tmp_path: Path) -> None:
    """A flipped bit is not mistaken for a fault of capture."""
    cache = Path(shutil.copytree(clinic.cache, tmp_path / "cache"))
    for shard in cache.glob("states/*/*.safetensors"):
        content = bytearray(shard.read_bytes())
        for place in range(len(content) // 2, len(content), 64):  # in every conversation's last states
            content[place] ^= 1
        shard.write_bytes(content)
    examination = clinic.examine(clinic.run / "speculator", cache=cache)["data/states"]
    assert examination.result == "wrong", examination
    assert "have another sha256" in examination.evidence
    assert "captures again" in examination.todo
