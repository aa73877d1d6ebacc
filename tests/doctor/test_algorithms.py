"""Every registered algorithm can be examined, and a sound one is healthy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clinic import Clinic, fit, training_row

from speculators.config import CONFIGS, ProposalConfig, SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.contract import build_model, trainer_kwargs
from speculators.facts import VerifierFacts
from speculators.recipe.decoder import draft_decoder_config

# What makes training exhaustive on a few answers: nothing left out at random, all depths weighed alike.
OPTIONS: dict[str, dict] = {
    "eagle3": {"ttt_steps": 3},
    "eagle1": {"alignment_steps": 3, "noise": 0.0, "loss": {"ce": 1.0}},
    "peagle": {"num_depths": 4, "keep": 1.0},
    "dflash": {"num_layers": 2, "block_size": 5, "weights": "exponential", "gamma": 1e6},
    "dspark": {"num_layers": 2, "block_size": 4, "markov_rank": 16, "gamma": 1e6, "loss": {"ce": 1.0}},
}
WHOLE_VOCABULARY = {"mtp"}


def trained(clinic: Clinic, name: str, folder: Path, spoil=None, steps: int = 250) -> Path:
    """Trains the algorithm until it knows the clinic's answers by heart."""
    config = SpeculatorModelConfig.get_class(name)(**OPTIONS.get(name, {}))
    facts = VerifierFacts.read(clinic.verifier / "config.json")
    own = type(config).layer_ids is not SpeculatorModelConfig.layer_ids
    layer_ids = config.layer_ids(4) if own else (1, 2, 3)
    said = {token for row in clinic.answers.rows for token in row.response.answer} | {0, 2}
    rest = [token for token in range(320) if token not in said]
    ids = torch.tensor(sorted([*said, *rest][: 320 if name in WHOLE_VOCABULARY else 256]))
    whole = len(ids) == 320
    kwargs = {
        **{field.name: getattr(config, field.name) for field in type(config).recipe_fields()},
        "verifier_name_or_path": str(clinic.verifier),
        "target_layer_ids": layer_ids,
        "draft_vocab_size": len(ids),
        "transformer_layer_config": draft_decoder_config(facts, config),
        "speculators_config": SpeculatorsConfig(
            algorithm=name,
            proposal_methods=(ProposalConfig(),),
            verifier=VerifierConfig(name_or_path=str(clinic.verifier), architectures=("LlamaForCausalLM",)),
        ),
        "t2d": None if whole else torch.zeros(320, dtype=torch.bool).index_fill_(0, ids, True),
        "d2t": None if whole else ids - torch.arange(len(ids)),
        "dtype": "float32",
        "seed": 0,
    }
    torch.manual_seed(0)
    model = build_model(name, facts, kwargs)
    if spoil is not None:
        spoil(model)
    fit(model, trainer_kwargs(model, kwargs)[0], training_row(clinic.answers, layer_ids), steps)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS.names())
def test_a_sound_speculator_is_healthy(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """Every applicable check passes, and the others say why they were not made."""
    examined = clinic.examine(trained(clinic, name, tmp_path / "speculator"))
    assert examined.with_result("wrong") == []
    for check in ("parity/step by step", "parity/packed rows", "parity/training's forward", "alignment/labels"):
        assert examined[check].result == "ok", examined[check]


@pytest.mark.slow
def test_states_behind_the_final_norm_are_diagnosed(clinic: Clinic, tmp_path: Path) -> None:
    """Trained on the last layer's output after the norm, it is served the output before the norm."""

    def spoil(model) -> None:
        model.verifier_norm.register_forward_pre_hook(lambda _, args: clinic.answers.head.normalize(args[0]))

    examined = clinic.examine(trained(clinic, "medusa", tmp_path / "speculator", spoil))
    assert examined["alignment/verifier's final norm"].result == "wrong"
    assert "after the final norm" in examined["alignment/verifier's final norm"].evidence
    assert examined["alignment/tokens"].result == "not checked"
