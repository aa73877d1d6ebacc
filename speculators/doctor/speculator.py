"""The speculator under examination: its checkpoint, its verifier and, if known, the run that trained it."""

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
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.lock import Lock
from speculators.recipe.schema import Recipe
from speculators.runs.places import RunFolder
from speculators.verifier.weights import VerifierHead, load_head


@attrs.frozen(eq=False, kw_only=True)
class TrainingRun:
    """The run that trained the checkpoint.

    Attributes:
        folder: the run folder.
        lock: everything that determined the result.
        recipe: the recipe that the lock resolves to.
    """

    folder: Path
    lock: Lock
    recipe: Recipe

    @classmethod
    def of(cls, speculator: Path) -> tuple[TrainingRun | None, str]:
        """Finds the run folder around a speculator; gives None and the reason if there is none or it is unreadable."""
        run = RunFolder.around(speculator)
        if run is None or not run.lock.is_file():
            return None, "the checkpoint is not in a run folder"
        try:
            lock = Lock.read(run.path)
            return cls(folder=run.path, lock=lock, recipe=lock.resolved(run.path)), ""
        except SpeculatorsError as error:
            return None, str(error)

    @property
    def trained(self) -> Mapping[str, Any]:
        """The inputs of training: `decoder`, `target_layer_ids`, `draft_vocab_size` and more."""
        return self.lock.inputs["train"]


@attrs.define(eq=False, kw_only=True)
class ExaminedSpeculator:
    """A readable checkpoint, loaded in float32 if its weights fit.

    Attributes:
        folder: contains config.json and model.safetensors.
        raw: the values of config.json.
        tensors: the contents of model.safetensors, as saved.
        verifier: the verifier's folder.
        facts: the verifier's config.json.
        origin: the run that trained it; None if unknown.
        origin_problem: why `origin` is None.
        device: where models run.
        config: the algorithm's config, with the training-only fields from the run's recipe; None if `raw` is not one.
        model: the model with its weights; None if they do not fit.
        trainable: names of the parameters that training updates.
    """

    folder: Path
    raw: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    verifier: Path
    facts: VerifierFacts
    origin: TrainingRun | None
    origin_problem: str
    device: torch.device
    config: SpeculatorModelConfig | None = None
    model: SpeculatorModel | None = None
    trainable: frozenset[str] = frozenset()

    @property
    def decoder(self) -> dict[str, Any]:
        """`transformer_layer_config`, or {} if it is missing."""
        decoder = self.raw.get("transformer_layer_config")
        return decoder if isinstance(decoder, dict) else {}

    @property
    def layer_ids(self) -> tuple[int, ...] | None:
        """Ids of the verifier's layers that the draft reads, whatever the algorithm calls them; None if unknown."""
        if self.model is not None:
            return tuple(self.model.draft().target_layer_ids)
        named = [value for key, value in self.raw.items() if key.endswith("layer_ids") and isinstance(value, list)]
        return tuple(named[0]) if named else None

    @property
    def num_tokens(self) -> int:
        """Tokens that a server drafts per round (K); 3 if config.json does not say."""
        table = self.config.speculators_config if self.config else None
        return table.proposal_methods[0].speculative_tokens if table and table.proposal_methods else 3

    @cached_property
    def head(self) -> VerifierHead:
        """The verifier's final norm and head, in the saved dtype."""
        return load_head(self.verifier, self.facts, dtype=None)

    @property
    def section(self) -> VerifierSection | None:
        """The `[verifier]` of the run's recipe: whether it may bring its own code, and its chat template."""
        return None if self.origin is None else self.origin.recipe.verifier

    @property
    def knobs_known(self) -> bool:
        """Whether the training-only fields come from a run, and are not the algorithm's defaults."""
        return self.origin is not None

    def with_config(self, **changes: Any) -> SpeculatorModel:
        """Builds the model with changed config.json values and the same weights."""
        assert self.config is not None
        return filled(attrs.evolve(self.config, **changes), self.folder, self.tensors, self.verifier, self.device)

    def fits(self, **changes: Any) -> bool:
        """Whether the changed config.json still describes exactly the saved tensors."""
        assert self.config is not None
        try:
            # The meta device allocates nothing: only names and shapes matter.
            with torch.device("meta"):
                blank = rebuild(attrs.evolve(self.config, **changes), self.folder)
        # An algorithm may reject values in any of these ways.
        except (SpeculatorsError, RuntimeError, ValueError, KeyError, TypeError):
            return False
        expected = {name: tensor.shape for name, tensor in blank.saved_names(blank.state_dict()).items()}
        return expected == {name: tensor.shape for name, tensor in self.tensors.items()}


def with_knobs(config: SpeculatorModelConfig, origin: TrainingRun | None) -> SpeculatorModelConfig:
    """Adds the training-only fields from the run's recipe to a config that was read from config.json."""
    trained = origin.recipe.algorithm.config if origin else None
    if type(trained) is not type(config):
        return config
    knobs = [field.name for field in attrs.fields(type(config)) if field.metadata.get("knob")]
    return attrs.evolve(config, **{name: getattr(trained, name) for name in knobs})


def filled(
    config: SpeculatorModelConfig,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    verifier: Path,
    device: torch.device,
) -> SpeculatorModel:
    """Builds a config's model in float32 with these weights, ready to draft.

    Raises:
        RuntimeError: a tensor has an unexpected shape.
        VerifierError: the verifier lacks a tensor that the checkpoint leaves to it.
    """
    model = rebuild(config, folder)
    model.load_state_dict(dict(tensors), strict=False)
    model.float()
    model.share_verifier(verifier)
    return model.to(device).float().eval().requires_grad_(False)
