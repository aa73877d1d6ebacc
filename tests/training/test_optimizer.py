"""Which parameter goes to which optimizer, and that priming changes nothing."""

from __future__ import annotations

import pytest
import torch
from training_toy import ADAMW, MUON, build, weights

from speculators.recipe.schema import OptimizerSection
from speculators.training.optimizer import Optimizer, WholeMuon, orthogonal


def give_gradients(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_layers_and_fc_and_nothing_of_the_vocabulary():
    """Matrices have a momentum buffer; norms, biases and the head have Adam's moments; frozen ones have no state."""
    model = build()
    optimizer = Optimizer(model, MUON, ema=None)
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
    optimizer = Optimizer(model, section, ema=None)
    assert optimizer.tensors() == {}
    optimizer.prime()
    assert optimizer.tensors()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_muon_updates_have_the_size_of_adamw_ones():
    """An update's root mean square is near 0.2 lr whatever the shape of the matrix, so that one lr fits all shapes."""
    model = build()
    before = weights(model)
    optimizer = Optimizer(model, OptimizerSection(name="muon", lr=1e-2), ema=None)
    give_gradients(model)
    optimizer.step(1.0)
    for name in ("fc.weight", "layers.0.up.weight", "layers.0.down.weight"):
        size = (model.get_parameter(name) - before[name]).square().mean().sqrt().item()
        # Five Newton-Schulz iterations leave singular values between 0.7 and 1.2.
        assert 0.7 * 0.2e-2 < size < 1.2 * 0.2e-2


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_muon_update_is_torchs_to_the_bit_where_there_are_bf16_products(shape, monkeypatch):
    """Two updates with momentum and decay, of a wide and a tall matrix."""
    monkeypatch.setattr("speculators.nn.precision.has_bf16_products", lambda device_type: True)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    found, wanted = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = WholeMuon([found], **settings), torch.optim.Muon([wanted], **settings)
    for _ in range(2):
        found.grad = torch.randn(shape, generator=generator)
        wanted.grad = found.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(found, wanted)
    assert not torch.equal(found, start)


def test_without_bf16_products_muon_orthogonalises_in_float32(monkeypatch):
    """The direction is float32, and within bf16's rounding (2^-8 in each of fifteen products) of the bf16 one."""
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    rule = {"coefficients": (3.4445, -4.775, 2.0315), "steps": 5, "eps": 1e-7}
    found = {}
    for has in (True, False):
        monkeypatch.setattr("speculators.nn.precision.has_bf16_products", lambda device_type, has=has: has)
        found[has] = orthogonal(matrix, **rule)
    assert [found[has].dtype for has in (True, False)] == [torch.bfloat16, torch.float32]
    difference = (found[True].float() - found[False]).norm() / found[False].norm()
    assert 0 < difference < 15 * 2**-8


def test_weight_decay_spares_what_is_not_a_matrix():
    """With gradients of zero, decay shrinks matrices by 1 - lr * decay and leaves norms and biases alone."""
    model = build()
    before = weights(model)
    optimizer = Optimizer(model, OptimizerSection(lr=0.1, weight_decay=0.5), ema=None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    after = weights(model)
    torch.testing.assert_close(after["fc.weight"], before["fc.weight"] * 0.95)
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert torch.equal(after["layers.0.up.bias"], before["layers.0.up.bias"])
