"""Weights that training never reached have the spectrum of noise; trained ones stand out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from speculators.doctor.untrained import _coarse, _trained, above_noise


def noise(rows: int, columns: int, seed: int, *, uniform: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if uniform:
        return 0.1 * (2 * torch.rand(rows, columns, generator=generator) - 1)
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (128, 384), (384, 128)])
def test_noise_has_no_mark_of_training(shape: tuple[int, int], uniform: bool) -> None:
    """Whatever the scale, random matrices of both distributions and any shape stay within their limits."""
    assert max(above_noise(noise(*shape, seed, uniform=uniform)) for seed in range(40)) < 1


def one_direction() -> torch.Tensor:
    return noise(200, 300, 0) + 0.15 * torch.outer(*(noise(1, size, 9)[0] for size in (200, 300)))


def spared_columns() -> torch.Tensor:
    return noise(200, 300, 0) * torch.linspace(0.7, 1.3, 300)


def uniform_start() -> torch.Tensor:
    return noise(200, 300, 0, uniform=True) + 0.03 * noise(200, 300, 1)


@pytest.mark.parametrize("learnt", [one_direction, spared_columns, uniform_start])
def test_what_training_adds_is_seen(learnt: Callable[[], torch.Tensor]) -> None:
    """A learnt direction, columns of different sizes, or something added to a uniform start: each is enough."""
    assert above_noise(learnt()) > 1.5


def test_untrained_parts_are_named_with_norms_of_one_value() -> None:
    """Acceptance decides between wrong and a warning."""
    good = noise(128, 128, 1) + 3 * torch.eye(128)[:1]
    tensors = {"fc.weight": noise(128, 256, 0), "norm.weight": torch.ones(40), "good.weight": good}
    check = _trained(tensors, accepts=False)
    assert check.result == "wrong"
    assert "like random numbers: fc.weight (" in check.evidence
    assert "one value throughout: norm.weight (all 1)" in check.evidence
    assert _trained(tensors, accepts=True).result == "warning"
    assert _trained({"good.weight": good}, accepts=False).result == "ok"


def test_eight_bits_are_seen_and_sixteen_pass() -> None:
    """Numbers that were once 8 bits have at most 256 values, in whatever format they are saved."""
    full = noise(120, 120, 0)
    coarse = (full / full.abs().max() * 127).round()
    assert _coarse({"fc.weight": full.bfloat16()}).result == "ok"
    check = _coarse({"fc.weight": coarse * 0.01, "other.weight": full})
    assert check.result == "warning"
    assert "rounded to 8 bits or fewer: fc.weight (" in check.evidence
