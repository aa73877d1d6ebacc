"""config.json against what the run was trained with: every value; without a run its options, by acceptance."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clinic import RECIPE, Clinic, edit, long_talks, write_talks
from command import Spec
from test_algorithms import trained

from speculators.doctor.check import Check
from speculators.doctor.run import admit
from speculators.doctor.subject import Patient
from speculators.doctor.trained import check_trained
from speculators.pipeline.measure import SavedSpeculator

pytestmark = pytest.mark.slow

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def block_run(clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a block drafter with an eps of its own; two updates, as nothing is drafted here."""
    home = tmp_path_factory.mktemp("block")
    spec = Spec(home)
    data = write_talks(home / "data.jsonl", long_talks())
    text = RECIPE.format(verifier=clinic.verifier, data=data, max_tokens=256, options="", steps=2)
    text = text.replace('"eagle3"', '"dflash"')
    text = text.replace("ttt_steps        = 3", "block_size = 6\ndecoder = { rms_norm_eps = 1e-5 }")
    (home / "block.toml").write_text(text)
    told = spec("run", home / "block.toml", "--runs", spec.runs, "--quiet")
    assert told.code == 0, told.err
    (run,) = spec.runs.glob("clinic-*")
    return run


def check(clinic: Clinic, run: Path, home: Path, change: Change) -> tuple[Check, Patient]:
    """What is said of a copy of a run whose config.json was changed."""
    speculator = Path(shutil.copytree(run, home / run.name)) / "speculator"
    edit(speculator, change)
    subject = SavedSpeculator(folder=speculator, recipe=None, verifier=str(clinic.verifier))
    patient, _ = admit(subject, clinic.wish())
    assert patient is not None
    return check_trained(patient), patient


def test_a_config_that_was_left_alone_is_what_the_run_was_trained_with(
    clinic: Clinic, block_run: Path, tmp_path: Path
) -> None:
    """What only a server reads may be changed: training knows nothing of it."""

    def drafts_more(config: dict[str, Any]) -> None:
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 2

    found, _ = check(clinic, block_run, tmp_path, drafts_more)
    assert found.result == "ok", found


CHANGES: dict[str, tuple[Change, str]] = {
    "sliding_window_non_causal": (
        lambda config: config.update(sliding_window_non_causal=False),
        "sliding_window_non_causal is False, training had True",
    ),
    "block_size": (lambda config: config.update(block_size=4), "block_size is 4, training had 6"),
    "mask_token_id": (lambda config: config.update(mask_token_id=7), "mask_token_id is 7, training had 319"),
    "mask_token_id, lost": (lambda config: config.pop("mask_token_id"), "mask_token_id is None, training had 319"),
    "sample_from_anchor": (
        lambda config: config.update(sample_from_anchor=True),
        "sample_from_anchor is True, training had False",
    ),
    "activation": (
        lambda config: config["transformer_layer_config"].update(hidden_act="gelu"),
        "transformer_layer_config.hidden_act is gelu, training had silu",
    ),
    "the recipe's own eps, written back to the verifier's": (
        lambda config: config["transformer_layer_config"].update(rms_norm_eps=1e-6),
        "transformer_layer_config.rms_norm_eps is 1e-06, training had 1e-05",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_value_that_differs_is_named_with_both_values(
    clinic: Clinic, block_run: Path, tmp_path: Path, name: str
) -> None:
    """No tensor shows any of these, and the draft is served by another rule than it was trained by."""
    change, words = CHANGES[name]
    found, patient = check(clinic, block_run, tmp_path, change)
    assert patient.model is not None
    assert found.result == "wrong"
    assert found.evidence.startswith(words)
    assert words.partition(" is ")[0] in found.todo


def test_an_option_that_was_flipped_is_told_by_acceptance(clinic: Clinic, tmp_path: Path) -> None:
    """Without a run each option that the same tensors fit is tried the other way; a sound one stays the best."""
    speculator = trained(clinic, "dflash", tmp_path / "speculator")
    edit(speculator, lambda config: config.update(sample_from_anchor=True))
    found = clinic.examine(speculator)
    assert found["alignment/options"].result == "wrong"
    assert "trained with sample_from_anchor = false, config.json says true" in found["alignment/options"].evidence
    assert "sample_from_anchor = false" in found["alignment/options"].todo
    assert found["config/as trained"].result == "not checked"
