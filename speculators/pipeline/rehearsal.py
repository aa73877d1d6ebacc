"""A plug-in's first step, on a tiny verifier: a broken contract is told before data is read or anything sharded."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.config import SpeculatorModelConfig, VerifierFacts
from speculators.errors import ContractError, SpeculatorsError
from speculators.events import WarningEvent
from speculators.model import BATCH_NAMES, SpeculatorModel, build_model, trainer_kwargs
from speculators.pipeline.build import training_kwargs
from speculators.pipeline.context import Listen
from speculators.recipe.plan import Plan, make_plan
from speculators.training.update import accepted_by, loss_and_metrics
from speculators.verifier.tiny import make_tiny_verifier

VOCABULARY = 128
DOCUMENTS = (20, 12)
# Keys of `algorithm.decoder` that mean the same for a decoder of another size.
SIZELESS = ("model_type", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")


def is_plugin(name: str) -> bool:
    """Whether an algorithm's folder is outside this package."""
    return not SpeculatorModelConfig.get_class(name).__module__.startswith("speculators.models.")


def rehearse(plan: Plan, tell: Listen) -> None:
    """Builds a plug-in's model for a tiny verifier with as many layers and runs one forward and backward.

    Whatever else goes wrong may be the small sizes' fault: it is told as a warning, and the run goes on.

    Raises:
        ContractError: a part of the contract is missing or wrong; names the class, the part and the mend.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            _rehearse(plan, Path(folder))
    except SpeculatorsError:
        raise
    # Somebody else's code may raise anything.
    except Exception as error:
        place = SpeculatorModel.get_class(plan.recipe.algorithm.name).__qualname__
        words = f"{place} failed on a tiny verifier, and may fail on this one: {type(error).__name__}: {error}"
        tell(WarningEvent(message=words))


def _rehearse(plan: Plan, folder: Path) -> None:
    make_tiny_verifier(folder, num_hidden_layers=plan.facts.num_hidden_layers)
    section = plan.recipe.algorithm
    decoder = {key: value for key, value in section.config.decoder.items() if key in SIZELESS}
    vocabulary = torch.arange(VOCABULARY) if plan.draft_vocab_size < plan.facts.vocab_size else None
    size = None if vocabulary is None else VOCABULARY
    config = attrs.evolve(section.config, decoder=decoder, draft_vocab_size=size)
    recipe = attrs.evolve(plan.recipe, algorithm=attrs.evolve(section, config=config))
    tiny = make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=plan.world_size)
    kwargs = training_kwargs(tiny, str(folder), vocabulary)
    model = build_model(section.name, tiny.facts, kwargs)
    given, _ = trainer_kwargs(model, kwargs)
    _check_signature(model, given)
    batch = _row(tiny)
    names = accepted_by(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kwargs["dtype"] == "bfloat16"):
        loss, _ = loss_and_metrics(model, model(**{name: batch[name] for name in names}, **given))
    loss.backward()
    if all(parameter.grad is None for parameter in model.parameters()):
        raise ContractError(
            f"{_place(model)}.forward's loss gives no gradient to any parameter",
            hint="compute it from the model's parameters, without detach() or no_grad()",
        )


def _check_signature(model: SpeculatorModel, given: dict[str, Any]) -> None:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = {p.name for p in parameters if p.default is p.empty and p.kind not in kinds}
    if lacking := sorted(wanted - {*BATCH_NAMES, *given}):
        names = ", ".join(lacking)
        raise ContractError(
            f"{_place(model)}.forward wants {names}, which neither the batch has nor get_trainer_kwargs gives",
            hint=f"return them from get_trainer_kwargs, or give them defaults; the batch has {', '.join(BATCH_NAMES)}",
        )


def _place(model: SpeculatorModel) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _row(plan: Plan) -> dict[str, torch.Tensor]:
    """Returns a packed row of two random documents, the second half of each supervised."""
    generator = torch.Generator().manual_seed(0)
    width, size = plan.facts.hidden_size, sum(DOCUMENTS)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    halves = torch.tensor(DOCUMENTS).repeat_interleave(torch.tensor(DOCUMENTS)) // 2
    dtype = getattr(torch, plan.recipe.data.states_dtype)
    states = torch.randn(1, size, len(plan.target_layer_ids) * width, generator=generator)
    return {
        "hidden_states": states.to(dtype),
        "verifier_last_hidden_states": states[..., :width].to(dtype),
        "input_ids": torch.randint(VOCABULARY, (1, size), generator=generator),
        "loss_mask": (positions >= halves)[None],
        "position_ids": positions[None],
        "document_ids": torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))[None],
    }
