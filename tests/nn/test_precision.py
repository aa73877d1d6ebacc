"""bfloat16 is kept on devices that multiply it, and replaced by float32 on those where it would be slower."""

from __future__ import annotations

import pytest
import torch

from speculators.nn.precision import beside_verifier, compute_dtype, has_bf16_products, place

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def has(request, monkeypatch):
    """Fakes a CPU with or without bf16 products."""
    monkeypatch.setattr("speculators.nn.precision.has_bf16_products", lambda device_type: request.param)
    return request.param


def test_only_bf16_gives_way(has):
    """Only bfloat16 changes, and only without bf16 products: it becomes float32."""
    assert compute_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if has else torch.float32)
    assert compute_dtype(torch.float16, CPU) == torch.float16
    assert compute_dtype(torch.float32, CPU) == torch.float32


@pytest.mark.parametrize(("capability", "has_them"), [(None, True), ((7, 0), False), ((7, 5), False), ((9, 0), True)])
def test_a_gpu_is_asked_for_its_bf16_products(capability, has_them, monkeypatch):
    """Ampere brought them: V100 and T4 compute in float32; without a GPU, plans are for one that has them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_bf16_products.__wrapped__("cuda") == has_them


def test_a_cpu_evaluates_in_float32():
    """Beside a verifier of 16 bits a draft in training is measured in 16 bits on a GPU alone."""
    with beside_verifier(torch.bfloat16, CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_a_model_is_placed_in_what_its_device_computes_in(has):
    """Frozen bf16 tensors are converted, too: products with them would take most of a draft's time."""
    model = torch.nn.Linear(4, 3).to(torch.bfloat16)
    values = model.weight.detach().float().clone()
    assert place(model, CPU) is model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16 if has else torch.float32}
    assert torch.equal(model.weight.float(), values)


@pytest.mark.parametrize("verifier", [torch.bfloat16, torch.float16, torch.float32])
def test_a_draft_is_no_more_precise_than_its_verifier(has, verifier):
    """Servers run both in one dtype; integers, such as a vocabulary's map, stay."""
    model = torch.nn.Linear(4, 3)
    model.register_buffer("map", torch.arange(3))
    place(model, CPU, beside=verifier)
    assert model.weight.dtype == compute_dtype(verifier, CPU)
    assert model.map.dtype == torch.int64
