"""Training that starts from a saved speculator: `algorithm.init_from`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.config import SpeculatorModelConfig
from speculators.contract import build_model
from speculators.errors import ArtifactError
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel, read_config, read_weights

KEY = "algorithm.init_from"

# Of the decoder's values those that change what weights of the same shapes compute.
DECODER = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)


def start_model(name: str, verifier_config: VerifierFacts, kwargs: Mapping[str, Any]) -> SpeculatorModel:
    """Builds the model that training starts with, from `init_from` of its training kwargs where they have one.

    Raises:
        ContractError: a part of the contract is missing.
        ArtifactError: `init_from` is of another algorithm, of another shape, or its weights mean something else; all
            differences are named.
    """
    if kwargs["init_from"] is None or kwargs["verifier_name_or_path"] is None:
        return build_model(name, verifier_config, kwargs)
    folder = Path(kwargs["init_from"])
    held = read_config(folder)
    model = build_model(name, verifier_config, with_held(name, kwargs, held))
    chosen = _chosen(model, name, held.speculators_model_type, folder)
    tensors = {key: tensor for key, tensor in read_weights(folder).items() if key.startswith(chosen)}
    _refuse(folder, [*differences(model.config, held), *_misshapen(model, chosen, tensors)])
    _take(model, tensors)
    return model


def check_start(name: str, verifier_config: VerifierFacts, kwargs: Mapping[str, Any]) -> None:
    """Checks the config of `init_from`, which takes no weights: before states are captured that would not fit.

    Raises:
        ArtifactError: it is of another algorithm, or its weights mean something else; all differences are named.
    """
    folder = Path(kwargs["init_from"])
    held = read_config(folder)
    with torch.device("meta"):
        model = build_model(name, verifier_config, with_held(name, {**kwargs, "verifier_name_or_path": None}, held))
    _chosen(model, name, held.speculators_model_type, folder)
    _refuse(folder, differences(model.config, held))


def differences(config: SpeculatorModelConfig, held: SpeculatorModelConfig) -> list[str]:
    """Returns where weights of `held` mean something else in a model of `config`: field, both values, the mend."""
    keys = {field.name for field in config.recipe_fields()}
    there = {field.name for field in attrs.fields(type(held))} - {"draft_vocab_size", *config.changeable}
    found = []
    for field in attrs.fields(type(config)):
        key = "target_layer_ids" if field.name.endswith("layer_ids") else field.name
        if field.name in there and key in {*keys, "target_layer_ids"} and not field.metadata.get("knob"):
            values = getattr(held, field.name), getattr(config, field.name)
            found += _difference(field.name, *values, f"algorithm.{key}" if key in keys else "")
    mine, theirs = (VerifierFacts(each.transformer_layer_config) for each in (config, held))
    for name in DECODER:
        one, other = (_rope(each) if name == "rope_parameters" else each.get(name) for each in (theirs, mine))
        found += _difference(name, one, other, f"algorithm.decoder.{name}")
    return found


def _difference(name: str, theirs: Any, mine: Any, mend: str) -> list[str]:
    if theirs == mine:
        return []
    told = f"its {name} is {_toml(theirs)}, the recipe's {_toml(mine)}"
    if not mend:
        return [told]
    return [f"{told}: leave out {mend}" if theirs is None else f"{told}: set {mend} = {_toml(theirs)}"]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return "none" if value is None else json.dumps(value)


def _rope(decoder: VerifierFacts) -> dict[str, Any]:
    """Returns the rotary embedding without what different programs write or leave out for the same."""
    told = {key: value for key, value in (decoder.get("rope_parameters") or {}).items() if value is not None}
    told.pop("type", None)
    if told.get("partial_rotary_factor") == 1:
        del told["partial_rotary_factor"]
    return {"rope_type": "default", **told}


def with_held(name: str, kwargs: Mapping[str, Any], held: SpeculatorModelConfig) -> dict[str, Any]:
    """Returns the kwargs with what only the checkpoint can know, where the recipe does not say it."""
    there = {field.name for field in attrs.fields(type(held))}
    wanted = [field for field in SpeculatorModelConfig.get_class(name).taken_over if field in there]
    return {**kwargs, **{field: getattr(held, field) for field in wanted if kwargs.get(field) is None}}


def start_vocabulary(name: str, init_from: str, draft_vocab_size: int) -> torch.Tensor | None:
    """Returns the draft vocabulary [D] of the checkpoint that training starts from; None where it keeps to its data.

    Raises:
        ArtifactError: it is of another size.
    """
    folder = Path(init_from)
    if read_config(folder).speculators_model_type != name:
        return None
    ids = SpeculatorModel.from_saved(folder).draft_to_target.cpu()
    if len(ids) != draft_vocab_size:
        raise ArtifactError(
            f"{KEY}: {folder} drafts {len(ids)} tokens, the recipe says {draft_vocab_size}",
            hint=f"set algorithm.draft_vocab_size = {len(ids)}",
        )
    return ids


def _chosen(model: SpeculatorModel, name: str, theirs: str, folder: Path) -> tuple[str, ...]:
    """Returns the prefixes of what is taken."""
    if theirs == name:
        return ("",)
    if not model.backbone:
        raise ArtifactError(f"{KEY}: {folder} is of the algorithm {theirs!r}, and {name!r} starts from its own alone")
    return model.backbone


def _misshapen(model: SpeculatorModel, chosen: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Returns which tensors are missing, unknown or of another shape."""
    saved = model.saved_names(model.state_dict())
    wanted = {name: tensor for name, tensor in saved.items() if name.startswith(chosen)}
    wrong = [f"{name} is not in it" for name in sorted(set(wanted) - set(tensors))]
    wrong += [f"it has {name}, the recipe's model has not" for name in sorted(set(tensors) - set(wanted))]
    return wrong + [
        f"{name} is {list(tensors[name].shape)}, the recipe's is {list(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if tensors[name].shape != wanted[name].shape
    ]


def _refuse(folder: Path, wrong: list[str]) -> None:
    if wrong:
        raise ArtifactError(f"{KEY}: {folder} is not what the recipe's model can start from:\n" + "\n".join(wrong))


def _take(model: SpeculatorModel, tensors: dict[str, torch.Tensor]) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in held and name not in trained:
            # What stays frozen keeps the file's dtype, as the verifier's would: a copy into another would round it.
            held[name].data = tensor
    model.load_state_dict(tensors, strict=False)
