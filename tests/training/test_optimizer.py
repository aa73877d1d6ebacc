"""Which parameter goes to which optimizer, and that priming changes nothing."""

from __future__ import annotations

import pytest
import torch
from training_toy import ADAMW, MUON, build, weights

from speculators.recipe.schema import OptimizerSection
from speculators.training.optimizer import Optimizer


def give_gradients(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_layers_and_fc_and_nothing_of_the_vocabulary():
    """Matrices have a momentum buffer; norms, biases and the head have Adam's moments; frozen ones have no state."""
    model = build()
    optimizer = Optimizer(model, MUON)
    optimizer.prime()
    by_muon = {name.removesuffix(".momentum_buffer") for name in optimizer.tensors() if "momentum" in name}
    by_adamw = {name.removesuffix(".exp_avg") for name in optimizer.tensors() if name.endswith("exp_avg")}
    layers = {f"layers.{i}.{part}.weight" for i in range(2) for part in ("up", "down")}
    assert by_muon == {"fc.weight", *layers}
    assert "lm_head.weight" in by_adamw
    assert by_muon | by_adamw == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("section", [ADAMW, MUON])
def test_priming_makes_the_state_and_leaves_the_weights(section):
    """The update at rate 0 that creates the optimizer's state changes no bit of a weight."""
    model = build()
    before = weights(model)
    optimizer = Optimizer(model, section)
    assert optimizer.tensors() == {}
    optimizer.prime()
    assert optimizer.tensors()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_muon_updates_have_the_size_of_adamw_ones():
    """An update's root mean square is near 0.2 lr whatever the shape of the matrix, so that one lr fits all shapes."""
    model = build()
    before = weights(model)
    optimizer = Optimizer(model, OptimizerSection(name="muon", lr=1e-2))
    give_gradients(model)
    optimizer.step(1.0)
    for name in ("fc.weight", "layers.0.up.weight", "layers.0.down.weight"):
        size = (model.get_parameter(name) - before[name]).square().mean().sqrt().item()
        # Five Newton-Schulz iterations leave singular values between 0.7 and 1.2.
        assert 0.7 * 0.2e-2 < size < 1.2 * 0.2e-2


def test_weight_decay_spares_what_is_not_a_matrix():
    """With gradients of zero, decay shrinks matrices by 1 - lr * decay and leaves norms and biases alone."""
    model = build()
    before = weights(model)
    optimizer = Optimizer(model, OptimizerSection(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    after = weights(model)
    torch.testing.assert_close(after["fc.weight"], before["fc.weight"] * 0.95)
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert torch.equal(after["layers.0.up.bias"], before["layers.0.up.bias"])
