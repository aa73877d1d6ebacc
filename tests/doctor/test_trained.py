"""Every value of config.json is compared with training; without a run, acceptance judges the options."""

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
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.doctor.trained import check_trained

pytestmark = pytest.mark.slow

ConfigEdit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def block_run(clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a block drafter with its own eps for two updates; these tests draft nothing."""
    home = tmp_path_factory.mktemp("block")
    spec = Spec(home)
    data = write_talks(home / "data.jsonl", long_talks())
    text = RECIPE.format(verifier=clinic.verifier, data=data, max_tokens=256, options="", steps=2)
    text = text.replace('"eagle3"', '"dflash"')
    text = text.replace("ttt_steps        = 3", "block_size = 6\ndecoder = { rms_norm_eps = 1e-5 }")
    (home / "block.toml").write_text(text)
    outcome = spec("run", home / "block.toml", "--runs", spec.runs, "--quiet")
    assert outcome.code == 0, outcome.err
    (run,) = spec.runs.glob("clinic-*")
    return run


def check(clinic: Clinic, run: Path, home: Path, change: ConfigEdit) -> tuple[Check, ExaminedSpeculator]:
    """Checks a copy of a run whose config.json was changed."""
    folder = Path(shutil.copytree(run, home / run.name)) / "speculator"
    edit(folder, change)
    speculator = clinic.load(folder)
    return check_trained(speculator), speculator


def test_a_config_that_was_left_alone_is_what_the_run_was_trained_with(
    clinic: Clinic, block_run: Path, tmp_path: Path
) -> None:
    """Values that only a server reads may change: training does not determine them."""

    def drafts_more(config: dict[str, Any]) -> None:
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 2

    examined, _ = check(clinic, block_run, tmp_path, drafts_more)
    assert examined.result == "ok", examined


CHANGES: dict[str, tuple[ConfigEdit, str]] = {
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
    """No tensor reveals these changes, and the draft is served by another rule than it was trained with."""
    change, words = CHANGES[name]
    examined, speculator = check(clinic, block_run, tmp_path, change)
    assert speculator.model is not None
    assert examined.result == "wrong"
    assert examined.evidence.startswith(words)
    assert words.partition(" is ")[0] in examined.todo


def test_acceptance_reveals_a_flipped_option(clinic: Clinic, tmp_path: Path) -> None:
    """Without a run, each option that fits the same tensors is flipped; the value of training accepts the most."""
    speculator = trained(clinic, "dflash", tmp_path / "speculator")
    edit(speculator, lambda config: config.update(sample_from_anchor=True))
    examined = clinic.examine(speculator)
    assert examined["alignment/options"].result == "wrong"
    assert "trained with sample_from_anchor = false, config.json says true" in examined["alignment/options"].evidence
    assert "sample_from_anchor = false" in examined["alignment/options"].todo
    assert examined["config/as trained"].result == "not checked"
