"""The plan on the device that a run has: bf16 where it multiplies that, float32 where it does not."""

from __future__ import annotations

import attrs
import torch

from speculators.nn.precision import has_bf16_products
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe


def settled(plan: Plan, device: torch.device) -> Plan:
    """Returns the plan with the precision that the device has; the fingerprints are the same on every machine."""
    if plan.precision == "bf16" and not has_bf16_products(device.type):
        return attrs.evolve(plan, precision="fp32")
    return plan


def settled_here(plan: Plan) -> Plan:
    """Returns the plan on this machine: its GPU, or its CPU where it has none."""
    return settled(plan, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def told_of(plan: Plan, device: torch.device) -> str:
    """Returns what computes in float32 instead of bf16, and the consequence, in words; "" where nothing does."""
    asked = bf16_asked(plan.recipe)
    if not asked or has_bf16_products(device.type):
        return ""
    words = "the same recipe, other last digits than on a machine that has them, twice the memory of what they hold"
    return f"this CPU has no bf16 products: {asked} compute in float32 ({words})"


def bf16_asked(recipe: Recipe) -> str:
    """Returns which parts of a recipe ask for bf16, in words."""
    data = recipe.data
    asked = {
        "verifier": recipe.verifier.dtype == "bfloat16",
        "answers": data.regenerate is not None and data.regenerate.dtype == "bfloat16",
        "states": data.states_dtype == "bfloat16",
        "training": recipe.schedule.precision == "bf16",
    }
    return ", ".join(name for name, wanted in asked.items() if wanted)
