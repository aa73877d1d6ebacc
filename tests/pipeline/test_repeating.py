"""Training on a GPU repeats its bits, or says why it may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speculators.pipeline import train
from speculators.recipe.load import load_recipe


def context(device: str = "cuda", **options: Any) -> Any:
    recipe = load_recipe("smoke", [f'{key}="{value}"' for key, value in options.items()])
    engine = SimpleNamespace(model=None)
    return SimpleNamespace(recipe=recipe, world=SimpleNamespace(device=torch.device(device)), engine=lambda _: engine)


def test_built_in_algorithms_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in the way of deterministic algorithms; a CPU needs none."""
    monkeypatch.setattr(train, "is_recurrent", lambda model: False)
    assert train.obstacle_to_repeating(context()) == ""
    monkeypatch.setattr(train, "is_plugin", lambda name: True)
    assert train.obstacle_to_repeating(context("cpu")) == ""
    assert "is a plug-in" in train.obstacle_to_repeating(context())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_streamed_states_do_not_repeat(device: str) -> None:
    """Servers round as their requests happen to be batched, on any device; what they have stored repeats."""
    obstacle = train.obstacle_to_repeating(context(device, **{"data.hidden_states": "streamed"}))
    assert 'data.hidden_states = "server" stores them first' in obstacle
    assert train.obstacle_to_repeating(context("cpu", **{"data.hidden_states": "server"})) == ""


def test_linear_attention_beside_training_may_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that computes states online is bound by the strictness of the process; stored states are not."""
    monkeypatch.setattr(train, "is_recurrent", lambda model: True)
    obstacle = train.obstacle_to_repeating(context(**{"data.hidden_states": "online"}))
    assert 'linear attention is not deterministic on a GPU; data.hidden_states = "cached"' in obstacle
    assert train.obstacle_to_repeating(context(**{"data.hidden_states": "cached"})) == ""
