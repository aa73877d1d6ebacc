"""Training starts from all of a checkpoint, or fails with one error that lists what does not fit."""

from __future__ import annotations

import attrs
import pytest
import torch

from speculators.errors import ArtifactError
from speculators.init_from import start_vocabulary
from speculators.models.eagle1 import Eagle1SpeculatorConfig
from speculators.models.eagle3 import Eagle3SpeculatorConfig


@pytest.fixture
def start(world, tmp_path):
    """A saved EAGLE-3 speculator with a trained head and a draft vocabulary that differs from the data's."""
    model, _ = world.build(Eagle3SpeculatorConfig(), 96)
    drafted = torch.arange(3, 99)
    model.get_buffer("d2t").copy_(drafted - torch.arange(96))
    model.get_buffer("t2d").copy_(torch.zeros(320, dtype=torch.bool).index_fill_(0, drafted, True))
    for parameter in (model.lm_head.weight, model.layers[0].hidden_norm.weight):
        parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_weights_head_and_vocabulary_are_the_checkpoints(world, start):
    """A frozen head keeps its trained rows; what is trained is float32."""
    folder, saved = start
    model = world.start(Eagle3SpeculatorConfig(init_from=str(folder)), 96)
    assert torch.equal(start_vocabulary("eagle3", str(folder), 96), torch.arange(3, 99))
    for name, tensor in saved.saved_names(saved.state_dict()).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.lm_head.weight.requires_grad
    assert all(held.dtype == torch.float32 for held in model.parameters() if held.requires_grad)


def test_without_one_training_starts_from_chance(world):
    """Without init_from a seed gives the weights of a freshly built model."""
    one, other = world.start(Eagle3SpeculatorConfig(), 96), world.build(Eagle3SpeculatorConfig(), 96)[0]
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_all_that_does_not_fit_is_one_error(world, start):
    """Missing, unknown and differently shaped tensors are reported together."""
    folder, _ = start
    with pytest.raises(ArtifactError) as told:
        world.start(Eagle3SpeculatorConfig(init_from=str(folder), num_layers=2, fc_norm=True), 128)
    for words in (
        "it lacks fc_norm.0.weight",
        "it lacks layers.1.mlp.up_proj.weight",
        "lm_head.weight is [96, 32], the recipe's is [128, 32]",
    ):
        assert words in str(told.value)
    with pytest.raises(ArtifactError, match=r"set algorithm\.draft_vocab_size = 96"):
        start_vocabulary("eagle3", str(folder), 128)


def test_another_algorithm_is_no_start_unless_it_says_so(world, start):
    """EAGLE-1 can take nothing from EAGLE-3, and keeps the vocabulary of its data."""
    folder, _ = start
    with pytest.raises(ArtifactError, match="can start only from its own kind"):
        world.start(Eagle1SpeculatorConfig(init_from=str(folder)))
    assert start_vocabulary("eagle1", str(folder), 96) is None


def test_a_published_bias_is_trained_on(world, tmp_path):
    """EAGLE-1's fc has a bias only if training starts from a checkpoint with one."""
    model, _ = world.build(Eagle1SpeculatorConfig())
    biased = type(model)(attrs.evolve(model.config, fc_bias=True))
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.save_pretrained(tmp_path)
    found = world.start(Eagle1SpeculatorConfig(init_from=str(tmp_path)))
    assert torch.equal(found.fc.bias, biased.fc.bias)
    assert found.config.fc_bias
