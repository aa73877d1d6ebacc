"""Training that starts from a saved speculator: `algorithm.init_from`."""

from __future__ import annotations

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
from speculators.recipe.decoder import rope_values
from speculators.structure.spelling import toml_text

KEY = "algorithm.init_from"

# Values of the decoder that change what weights of the same shapes compute.
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
    """Builds the model that training starts with, loading the checkpoint that `init_from` names, if any.

    Raises:
        ContractError: a part of the contract is missing.
        ArtifactError: the checkpoint is of another algorithm or shape, or its weights mean something else; lists all
            differences.
    """
    if kwargs["init_from"] is None or kwargs["verifier_name_or_path"] is None:
        return build_model(name, verifier_config, kwargs)
    folder = Path(kwargs["init_from"])
    saved = read_config(folder)
    model = build_model(name, verifier_config, with_saved_values(name, kwargs, saved))
    prefixes = _prefixes(model, name, saved.speculators_model_type, folder)
    tensors = {key: tensor for key, tensor in read_weights(folder).items() if key.startswith(prefixes)}
    _refuse(folder, [*differences(model.config, saved), *_misshapen(model, prefixes, tensors)])
    _load(model, tensors)
    return model


def check_start(name: str, verifier_config: VerifierFacts, kwargs: Mapping[str, Any]) -> None:
    """Checks the config of `init_from` without its weights, before states are captured for a start that cannot be.

    Raises:
        ArtifactError: the checkpoint is of another algorithm, or its weights mean something else.
    """
    folder = Path(kwargs["init_from"])
    saved = read_config(folder)
    with torch.device("meta"):
        without_verifier = {**kwargs, "verifier_name_or_path": None}
        model = build_model(name, verifier_config, with_saved_values(name, without_verifier, saved))
    _prefixes(model, name, saved.speculators_model_type, folder)
    _refuse(folder, differences(model.config, saved))


def differences(config: SpeculatorModelConfig, saved: SpeculatorModelConfig) -> list[str]:
    """Lists the values with which weights of `saved` mean something else in `config`: field, both values, remedy."""
    keys = {field.name for field in config.recipe_fields()}
    # The draft vocabulary is taken from the checkpoint, so it cannot differ.
    common = {field.name for field in attrs.fields(type(saved))} - {"draft_vocab_size", *config.changeable}
    lines = []
    for field in attrs.fields(type(config)):
        # Formats name the layers that a draft reads in their own way; a recipe has one key for all.
        key = "target_layer_ids" if field.name.endswith("layer_ids") else field.name
        if field.name in common and key in {*keys, "target_layer_ids"} and not field.metadata.get("knob"):
            values = getattr(saved, field.name), getattr(config, field.name)
            lines += _difference(field.name, *values, f"algorithm.{key}" if key in keys else "")
    mine, theirs = (VerifierFacts(each.transformer_layer_config) for each in (config, saved))
    for name in DECODER:
        one, other = (_rope(each) if name == "rope_parameters" else each.get(name) for each in (theirs, mine))
        lines += _difference(name, one, other, f"algorithm.decoder.{name}")
    return lines


def _difference(name: str, theirs: Any, mine: Any, key: str) -> list[str]:
    if theirs == mine:
        return []
    text = f"its {name} is {toml_text(theirs)}, the recipe's {toml_text(mine)}"
    if not key:
        return [text]
    return [f"{text}: leave out {key}" if theirs is None else f"{text}: set {key} = {toml_text(theirs)}"]


def _rope(decoder: VerifierFacts) -> dict[str, Any]:
    """Drops keys of a rotary embedding that some programs write and others omit, with the same meaning."""
    values = {key: value for key, value in (decoder.get("rope_parameters") or {}).items() if value is not None}
    values = rope_values(values)
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    return {"rope_type": "default", **values}


def with_saved_values(name: str, kwargs: Mapping[str, Any], saved: SpeculatorModelConfig) -> dict[str, Any]:
    """Fills in the values that only the checkpoint knows (`taken_over`), unless the recipe sets them."""
    available = {field.name for field in attrs.fields(type(saved))}
    fields = [field for field in SpeculatorModelConfig.get_class(name).taken_over if field in available]
    return {**kwargs, **{field: getattr(saved, field) for field in fields if kwargs.get(field) is None}}


def start_vocabulary(name: str, init_from: str, draft_vocab_size: int) -> torch.Tensor | None:
    """The draft vocabulary [D] of the checkpoint that training starts from; None if its algorithm is another.

    Raises:
        ArtifactError: the vocabulary's size differs from the recipe's.
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


def _prefixes(model: SpeculatorModel, name: str, theirs: str, folder: Path) -> tuple[str, ...]:
    """The prefixes of the tensors to load; "" for all."""
    if theirs == name:
        return ("",)
    if not model.backbone:
        raise ArtifactError(
            f"{KEY}: {folder} holds a {theirs!r} speculator, and {name!r} can start only from its own kind"
        )
    return model.backbone


def _misshapen(model: SpeculatorModel, prefixes: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Lists tensors that are missing, unknown or of another shape."""
    saved = model.saved_names(model.state_dict())
    own = {name: tensor for name, tensor in saved.items() if name.startswith(prefixes)}
    lines = [f"it lacks {name}" for name in sorted(set(own) - set(tensors))]
    lines += [f"it has {name}, which the recipe's model lacks" for name in sorted(set(tensors) - set(own))]
    return lines + [
        f"{name} is {list(tensors[name].shape)}, the recipe's is {list(own[name].shape)}"
        for name in sorted(set(own) & set(tensors))
        if tensors[name].shape != own[name].shape
    ]


def _refuse(folder: Path, lines: list[str]) -> None:
    if lines:
        raise ArtifactError(f"{KEY}: {folder} does not fit the recipe's model:\n" + "\n".join(lines))


def _load(model: SpeculatorModel, tensors: dict[str, torch.Tensor]) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in parameters and name not in trained:
            # Frozen tensors keep the file's dtype, as the verifier's would: load_state_dict would round them into the
            # parameter's dtype.
            parameters[name].data = tensor
    model.load_state_dict(tensors, strict=False)
