"""A checkpoint whose weights mean something else is refused as a start; values that only it knows are inherited."""

from __future__ import annotations

import attrs
import pytest

from speculators.config import SpeculatorModelConfig
from speculators.init_from import differences, with_saved_values

DECODER = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def config(name: str, **values: object) -> SpeculatorModelConfig:
    return SpeculatorModelConfig.get_class(name)(**{"transformer_layer_config": DECODER, **values})


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "eagle3",
            {"eagle_aux_hidden_state_layer_ids": (2, 4, 6)},
            "layer_ids is [2, 4, 6], the recipe's []: set algorithm.target_layer_ids = [2, 4, 6]",
        ),
        ("medusa", {"target_layer_ids": (4,)}, "its target_layer_ids is [4], the recipe's none"),
        (
            "eagle3",
            {"norm_before_residual": False},
            "its norm_before_residual is false, the recipe's true: set algorithm.norm_before_residual = false",
        ),
        ("dflash", {"mask_token_id": 7}, "its mask_token_id is 7, the recipe's none: set algorithm.mask_token_id = 7"),
        (
            "dflash",
            {"sliding_window_non_causal": False},
            "is false, the recipe's true: set algorithm.sliding_window_non_causal = false",
        ),
        (
            "mtp",
            {"transformer_layer_config": {**DECODER, "sliding_window": 64}},
            "its sliding_window is 64, the recipe's none: set algorithm.decoder.sliding_window = 64",
        ),
        (
            "eagle1",
            {"transformer_layer_config": {**DECODER, "rope_parameters": {"rope_theta": 5.0}}},
            'set algorithm.decoder.rope_parameters = { rope_type = "default", rope_theta = 5.0 }',
        ),
        ("peagle", {"transformer_layer_config": {**DECODER, "num_attention_heads": 8}}, "its num_attention_heads is 8"),
    ],
)
def test_weights_of_the_same_shapes_that_mean_something_else_are_refused(
    name: str, other: dict[str, object], message: str
) -> None:
    """The message gives the field, both values and the key to set. Starting the other way round is refused too."""
    assert message in "\n".join(differences(config(name), config(name, **other)))
    assert differences(config(name, **other), config(name))
    assert differences(config(name, **other), config(name, **other)) == []


def test_a_block_drafter_of_another_algorithm_is_compared_by_shared_fields() -> None:
    """DFlash's backbone was trained with its mask token, so that must match; its block length may differ."""
    saved = config("dflash", mask_token_id=7, block_size=16, aux_hidden_state_layer_ids=(1, 2))
    mine = config("dspark", mask_token_id=9, block_size=8, cut="gain", aux_hidden_state_layer_ids=(1, 2))
    assert differences(mine, saved) == ["its mask_token_id is 7, the recipe's 9: set algorithm.mask_token_id = 7"]
    assert differences(attrs.evolve(mine, mask_token_id=7), saved) == []


def test_different_spellings_of_the_same_rotary_embedding_do_not_differ() -> None:
    """Older files put rope_theta at the top and omit the type; a factor of one may be omitted."""
    older = {key: value for key, value in DECODER.items() if key != "rope_parameters"}
    for decoder in (
        {**older, "rope_theta": 10000},
        {**older, "rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 1.0}},
    ):
        assert differences(config("eagle3"), config("eagle3", transformer_layer_config=decoder)) == []


def test_a_mask_token_that_the_recipe_leaves_out_is_the_checkpoints() -> None:
    """The mask token comes from the checkpoint if the recipe omits it; a value in the recipe is kept and compared."""
    saved = config("dflash", mask_token_id=7)
    for name in ("dflash", "dspark"):
        assert with_saved_values(name, {"mask_token_id": None}, saved)["mask_token_id"] == 7
        assert with_saved_values(name, {"mask_token_id": 9}, saved)["mask_token_id"] == 9
    assert "mask_token_id" not in with_saved_values("eagle3", {}, saved)
