"""The precision of a run on CPUs with and without bf16 products."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from speculators.facts import VerifierFacts
from speculators.pipeline.setup import bf16_parts, on_device, precision_warning
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan


@pytest.mark.parametrize("has", [True, False])
def test_the_plan_names_its_precision_and_keeps_its_fingerprints(has, tiny_verifier, monkeypatch):
    """The plan names the precision, but a recipe has the same fingerprints on every CPU."""
    monkeypatch.setattr("speculators.pipeline.setup.has_bf16_products", lambda device_type: has)
    facts = VerifierFacts.read(tiny_verifier / "config.json")
    plan = make_plan(load_recipe("smoke", ['schedule.precision="bf16"']), facts)
    adjusted = on_device(plan, torch.device("cpu"))
    assert plan.precision == "bf16"
    assert adjusted.precision == ("bf16" if has else "fp32")
    assert adjusted.stages == plan.stages
    assert ("training compute in float32" in precision_warning(plan, torch.device("cpu"))) != has


def test_the_warning_names_the_kind_of_device(monkeypatch):
    """A GPU before Ampere is not called a CPU."""
    monkeypatch.setattr("speculators.pipeline.setup.has_bf16_products", lambda device_type: False)
    plan = SimpleNamespace(recipe=load_recipe("eagle3_llama8b"))
    assert precision_warning(plan, torch.device("cuda", 0)).startswith("this GPU has no bf16 products: verifier, ")


def test_the_parts_that_ask_for_bf16_are_named():
    """The warning of a run names every part that computes in float32 instead."""
    assert bf16_parts(load_recipe("smoke")) == ""
    assert bf16_parts(load_recipe("smollm2_eagle3")) == "answers, states, training"
    assert bf16_parts(load_recipe("eagle3_llama8b")) == "verifier, states, training"
