"""Training that starts from a saved speculator: `algorithm.init_from`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from speculators.config import VerifierFacts
from speculators.errors import ArtifactError
from speculators.model import SpeculatorModel, build_model, read_config, read_weights

KEY = "algorithm.init_from"


def start_model(name: str, verifier_config: VerifierFacts, kwargs: Mapping[str, Any]) -> SpeculatorModel:
    """Builds the model that training starts with, from `init_from` of its training kwargs where they have one.

    Raises:
        ContractError: a part of the contract is missing.
        ArtifactError: `init_from` is of another algorithm or of another shape; all differences are named.
    """
    if kwargs["init_from"] is None or kwargs["verifier_name_or_path"] is None:
        return build_model(name, verifier_config, kwargs)
    folder = Path(kwargs["init_from"])
    held = read_config(folder)
    if held.speculators_model_type == name:
        kwargs = {**kwargs, **{field: getattr(held, field) for field in type(held).taken_over}}
    model = build_model(name, verifier_config, kwargs)
    _take(model, _chosen(model, name, held.speculators_model_type, folder), read_weights(folder), folder)
    return model


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


def _chosen(model: SpeculatorModel, name: str, theirs: str, folder: Path) -> tuple[str, ...] | None:
    """Returns the prefixes of what is taken, None for all that is saved."""
    if theirs == name:
        return None
    if not model.backbone:
        raise ArtifactError(f"{KEY}: {folder} is of the algorithm {theirs!r}, and {name!r} starts from its own alone")
    return model.backbone


def _take(
    model: SpeculatorModel, chosen: tuple[str, ...] | None, tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    wanted = model.saved_names(model.state_dict())
    if chosen is not None:
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith(chosen)}
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(chosen)}
    wrong = [f"{name} is not in it" for name in sorted(set(wanted) - set(tensors))]
    wrong += [f"it has {name}, the recipe's model has not" for name in sorted(set(tensors) - set(wanted))]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, the recipe's is {list(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        raise ArtifactError(f"{KEY}: {folder} is of another shape:\n" + "\n".join(wrong))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in held and name not in trained:
            # What stays frozen keeps the file's dtype, as the verifier's would: a copy into another would round it.
            held[name].data = tensor
    model.load_state_dict(tensors, strict=False)
