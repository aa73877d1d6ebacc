"""How large a speculator will be, known before there are weights."""

from __future__ import annotations

import attrs
import torch

from speculators.model import SpeculatorModel, build_model
from speculators.pipeline.build import training_kwargs
from speculators.recipe.plan import Plan


def parameter_counts(model: SpeculatorModel) -> dict[str, int]:
    """Returns the parameters that are trained and those that are only kept; the verifier's own are in neither."""
    own = model.saved_names(dict(model.named_parameters()))
    trainable = sum(parameter.numel() for parameter in own.values() if parameter.requires_grad)
    return {"trainable": trainable, "frozen": sum(parameter.numel() for parameter in own.values()) - trainable}


def with_parameters(plan: Plan) -> Plan:
    """Returns the plan with its parameter counts: the model is built in full, but of tensors without storage.

    Raises:
        Exception: whatever a plug-in's `from_training_args` raises where it gets no verifier to read weights from.
    """
    reduced = plan.draft_vocab_size < plan.facts.vocab_size
    with torch.device("meta"):
        kwargs = training_kwargs(plan, None, torch.arange(plan.draft_vocab_size) if reduced else None)
        model = build_model(plan.recipe.algorithm.name, plan.facts, kwargs)
    return attrs.evolve(plan, parameters=parameter_counts(model))
