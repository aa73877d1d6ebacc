"""Algorithms' configs reject bad values without torch."""

from __future__ import annotations

import pytest

from speculators.config import CONFIGS, LOSSES, SpeculatorModelConfig
from speculators.losses import LOSSES as REGISTERED
from speculators.structure.converter import structure


def test_the_losses_listed_without_torch_are_the_registered_ones() -> None:
    """Neither list can change alone."""
    assert list(LOSSES) == REGISTERED.names()


@pytest.mark.parametrize("name", CONFIGS.names())
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kl_dvi": 1.0}, "no loss 'kl_dvi'; available: ce, jsd, kl_div"),
        ({"kl_dvi": 1.0}, "did you mean 'kl_div'?"),
        ({}, "at least one loss a weight > 0"),
        ({"ce": -1.0}, "at least one loss a weight > 0"),
        ({"ce": 2.0, "tv": -1.0}, "none a weight below 0"),
    ],
)
def test_every_algorithm_refuses_a_mixture_that_cannot_be_trained_on(
    name: str, loss: dict[str, float], message: str
) -> None:
    """A misspelt loss is reported with its near miss, before any training."""
    config, (problem, *others) = structure({"loss": loss}, SpeculatorModelConfig.get_class(name))
    assert (config, others, problem.path) == (None, [], "loss")
    assert message in problem.message
