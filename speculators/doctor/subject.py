"""What is examined: a checkpoint, the run that it comes from where there is one, and its verifier."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.config import SpeculatorModelConfig
from speculators.errors import SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel, rebuild
from speculators.recipe.lock import Lock
from speculators.recipe.schema import Recipe
from speculators.runs.places import RunFolder
from speculators.verifier.weights import VerifierHead, load_head


@attrs.frozen(eq=False, kw_only=True)
class Origin:
    """The run that trained the checkpoint.

    Attributes:
        folder: of the run.
        lock: what determined it.
        recipe: as it was.
    """

    folder: Path
    lock: Lock
    recipe: Recipe

    @classmethod
    def of(cls, speculator: Path) -> tuple[Origin | None, str]:
        """Returns the run that a speculator is in, or None and why there is none that can be read."""
        run = RunFolder.around(speculator)
        if run is None or not run.lock.is_file():
            return None, "the checkpoint is in no run folder"
        try:
            lock = Lock.read(run.path)
            return cls(folder=run.path, lock=lock, recipe=lock.resolved(run.path)), ""
        except SpeculatorsError as error:
            return None, str(error)

    @property
    def trained(self) -> Mapping[str, Any]:
        """What the run was trained with: `decoder`, `target_layer_ids`, `draft_vocab_size` and more."""
        return self.lock.inputs["train"]


@attrs.define(eq=False, kw_only=True)
class Patient:
    """A checkpoint that could be read, in float32 as far as it can be loaded.

    Attributes:
        folder: holds config.json and model.safetensors.
        raw: config.json.
        tensors: of model.safetensors, as saved.
        verifier: folder of the verifier.
        facts: the verifier's config.json.
        origin: its run; None with `no_origin`, the reason.
        device: where models run.
        config: of its algorithm's class, with what only training reads from the run's recipe; None if raw is not one.
        model: with its weights; None if they do not fit.
        trainable: names of the parameters that training moves.
    """

    folder: Path
    raw: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    verifier: Path
    facts: VerifierFacts
    origin: Origin | None
    no_origin: str
    device: torch.device
    config: SpeculatorModelConfig | None = None
    model: SpeculatorModel | None = None
    trainable: frozenset[str] = frozenset()

    @property
    def decoder(self) -> dict[str, Any]:
        """`transformer_layer_config`, {} where there is none."""
        held = self.raw.get("transformer_layer_config")
        return held if isinstance(held, dict) else {}

    @property
    def layer_ids(self) -> tuple[int, ...] | None:
        """The verifier's layers that the draft reads, under whatever name the algorithm writes them; None for none."""
        if self.model is not None:
            return tuple(self.model.draft().target_layer_ids)
        named = [value for key, value in self.raw.items() if key.endswith("layer_ids") and isinstance(value, list)]
        return tuple(named[0]) if named else None

    @property
    def num_tokens(self) -> int:
        """Tokens that a server drafts a round (K), 3 where config.json does not say."""
        held = self.config.speculators_config if self.config else None
        return held.proposal_methods[0].speculative_tokens if held and held.proposal_methods else 3

    @cached_property
    def head(self) -> VerifierHead:
        """The verifier's final norm and head, as saved."""
        return load_head(self.verifier, self.facts, dtype=None)

    @property
    def trust_remote_code(self) -> bool:
        """Whether the verifier may bring code, as the run's recipe says."""
        return self.origin is not None and self.origin.recipe.verifier.trust_remote_code

    @property
    def knobs_known(self) -> bool:
        """Whether what only training reads is known, and not the algorithm's defaults."""
        return self.origin is not None

    def with_config(self, **changes: Any) -> SpeculatorModel:
        """Returns the model with other values in config.json and the same weights."""
        assert self.config is not None
        return filled(attrs.evolve(self.config, **changes), self.folder, self.tensors, self.verifier, self.device)

    def fits(self, **changes: Any) -> bool:
        """Whether config.json with other values has exactly the tensors that are saved."""
        assert self.config is not None
        try:
            # Without storage: only names and shapes are wanted.
            with torch.device("meta"):
                blank = rebuild(attrs.evolve(self.config, **changes), self.folder)
        # Values that the algorithm does not take, in its own words.
        except (SpeculatorsError, RuntimeError, ValueError, KeyError, TypeError):
            return False
        wanted = {name: tensor.shape for name, tensor in blank.saved_names(blank.state_dict()).items()}
        return wanted == {name: tensor.shape for name, tensor in self.tensors.items()}


def with_knobs(config: SpeculatorModelConfig, origin: Origin | None) -> SpeculatorModelConfig:
    """Returns a config.json's config with what only training reads, from the recipe of its run."""
    told = origin.recipe.algorithm.config if origin else None
    if type(told) is not type(config):
        return config
    knobs = [field.name for field in attrs.fields(type(config)) if field.metadata.get("knob")]
    return attrs.evolve(config, **{name: getattr(told, name) for name in knobs})


def filled(
    config: SpeculatorModelConfig,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    verifier: Path,
    device: torch.device,
) -> SpeculatorModel:
    """Returns the model of a config with these weights, in float32, ready to draft.

    Raises:
        RuntimeError: a tensor has another shape.
        VerifierError: what the checkpoint leaves out is not in the verifier.
    """
    model = rebuild(config, folder)
    model.load_state_dict(dict(tensors), strict=False)
    model.float()
    model.share_verifier(verifier)
    return model.to(device).float().eval().requires_grad_(False)
