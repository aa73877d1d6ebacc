"""Checks that an algorithm meets the contract, before data is read and anything is sharded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from speculators.config import SpeculatorModelConfig
from speculators.errors import ContractError
from speculators.facts import VerifierFacts
from speculators.model import BATCH_NAMES, SpeculatorModel, missing_part
from speculators.registry import qualified_name

# An algorithm's own version of these must accept the arguments of the base's.
_HOOKS = ("align", "replay", "draft", "share_verifier")


def check_contract(model_class: type[SpeculatorModel], name: str) -> None:
    """Checks the parts of the contract that the class alone shows.

    Raises:
        ContractError: names the class, the missing part and the code to write.
    """
    place = qualified_name(model_class)
    if not (isinstance(model_class, type) and issubclass(model_class, SpeculatorModel)):
        raise ContractError(f"{place} is registered as {name!r} but does not derive from SpeculatorModel")
    if model_class.forward is nn.Module.forward:
        raise ContractError(f"{place} has no forward", hint="def forward(self, **batch): return output, loss, metrics")
    build = "from_training_args"
    if inspect.getattr_static(model_class, build) is inspect.getattr_static(SpeculatorModel, build):
        raise ContractError(missing_part(model_class, build, "it must be a classmethod that returns the model"))
    parameters = inspect.signature(model_class.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not set(BATCH_NAMES) & set(parameters):
        raise ContractError(
            f"{place}.forward takes no argument of the batch", hint=f"it may name: {', '.join(BATCH_NAMES)}"
        )


def _check_call(model: SpeculatorModel | type[SpeculatorModel], name: str, *positional: Any, **named: Any) -> None:
    """Raises ContractError if a hook's signature does not accept the arguments of its later call."""
    try:
        inspect.signature(getattr(model, name)).bind(*positional, **named)
    except TypeError as error:
        model_class = model if isinstance(model, type) else type(model)
        base = inspect.signature(getattr(SpeculatorModel, name))
        plain = base.replace(
            parameters=[p.replace(annotation=p.empty) for p in base.parameters.values()],
            return_annotation=base.empty,
        )
        raise ContractError(
            f"{qualified_name(model_class)}.{name} does not accept the arguments of its call: {error}",
            hint=f"it is called as: {name}{plain}",
        ) from None


def _check_hooks(model: SpeculatorModel) -> None:
    for name in _HOOKS:
        # The base's hook is bound to this model, as the model's own is, so that `self` is in neither signature.
        base = inspect.signature(SpeculatorModel.__dict__[name].__get__(model)).parameters.values()
        positional = [p.name for p in base if p.kind is not p.KEYWORD_ONLY]
        _check_call(model, name, *positional, **{p.name: None for p in base if p.kind is p.KEYWORD_ONLY})


def build_model(name: str, verifier_config: VerifierFacts, kwargs: Mapping[str, Any]) -> SpeculatorModel:
    """Builds the model of algorithm `name` from its training kwargs and checks the contract.

    Raises:
        ContractError: a part of the contract is missing, or a hook does not accept the arguments of its call.
    """
    model_class = SpeculatorModel.get_class(name)
    check_contract(model_class, name)
    _check_call(model_class, "from_training_args", verifier_config, **kwargs)
    model = model_class.from_training_args(verifier_config, **kwargs)
    place = qualified_name(model_class)
    if not isinstance(model, SpeculatorModel):
        raise ContractError(f"{place}.from_training_args returned {type(model).__name__}, not the model")
    if not isinstance(getattr(model, "layers", None), nn.ModuleList):
        raise ContractError(
            f"{place} has no attribute layers", hint="self.layers = nn.ModuleList([...]); each is sharded"
        )
    _check_hooks(model)
    if model.config is None:
        model.config = SpeculatorModelConfig.get_class(name).pick(kwargs)
    plain = {key: value for key, value in kwargs.items() if _is_json(value)}
    model.rebuild_args = {"verifier_config": verifier_config.to_dict(), "kwargs": plain}
    model.rebuild_tensors = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return model


def trainer_kwargs(model: SpeculatorModel, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Asks the model for its own arguments of `forward`, in training and validation, and checks them.

    Raises:
        ContractError: not a pair of dicts, names that the batch uses, or names that `forward` does not accept.
    """
    place = qualified_name(type(model))
    _check_call(model, "get_trainer_kwargs", **kwargs)
    pair = model.get_trainer_kwargs(**kwargs)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, dict) for part in pair)):
        raise ContractError(f"{place}.get_trainer_kwargs must return (train_kwargs, val_kwargs), two dicts")
    if twice := sorted({*pair[0], *pair[1]} & {*BATCH_NAMES, "layout"}):
        raise ContractError(
            f"{place}.get_trainer_kwargs returns {', '.join(twice)}, a name of the batch", hint="choose another name"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        extra = sorted({*pair[0], *pair[1]} - {p.name for p in parameters})
        if extra:
            raise ContractError(
                f"{place}.forward does not take {', '.join(extra)}, which get_trainer_kwargs returns",
                hint="name them in forward, or accept **kwargs",
            )
    return pair


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))


def parameter_counts(model: SpeculatorModel) -> dict[str, int]:
    """Counts the parameters that are trained and those that stay frozen; the verifier's own are in neither."""
    own = model.saved_names(dict(model.named_parameters()))
    trainable = sum(parameter.numel() for parameter in own.values() if parameter.requires_grad)
    return {"trainable": trainable, "frozen": sum(parameter.numel() for parameter in own.values()) - trainable}
