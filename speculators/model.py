"""SpeculatorModel: the base of every algorithm's model, and the contract it is held to before anything is sharded."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from speculators.config import SpeculatorModelConfig, refuse_built_in
from speculators.drafter import Drafter
from speculators.errors import ArtifactError, ContractError, SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.registry import Registry
from speculators.structure.converter import structure

M = TypeVar("M", bound="type[SpeculatorModel]")

WEIGHTS_FILE = "model.safetensors"
REBUILD_FILE = "training_args.json"
REBUILD_TENSORS_FILE = "training_args.safetensors"

# Written by transformers beside our own keys, without meaning for a speculator.
_FOREIGN_KEYS = {"transformers_version", "dtype", "torch_dtype", "model_type", "auto_map", "has_no_defaults_at_init"}

# What every forward is called with; models/README.md gives shapes and meaning.
BATCH_NAMES = (
    "hidden_states",
    "verifier_last_hidden_states",
    "input_ids",
    "loss_mask",
    "position_ids",
    "document_ids",
)


class SpeculatorModel(nn.Module):
    """A draft model and what is needed to train, save, load and draft with it.

    A subclass sets `layers`, an nn.ModuleList whose entries are sharded one by one, and implements
    `from_training_args` and `forward`; the hooks below have defaults that say what is missing.
    """

    layers: nn.ModuleList
    # Prefixes of state-dict names that are the verifier's and not part of the checkpoint.
    not_saved: tuple[str, ...] = ()
    # Prefixes of what training can start from in another algorithm's checkpoint; without any it starts from its own.
    backbone: tuple[str, ...] = ()

    def __init__(self, config: SpeculatorModelConfig | None = None) -> None:
        super().__init__()
        self.config: Any = config
        self.rebuild_args: dict[str, Any] = {}
        self.rebuild_tensors: dict[str, torch.Tensor] = {}

    @staticmethod
    def register(name: str) -> Callable[[M], M]:
        """Class decorator that registers a model under `name`; raises RegistryError if the name is taken."""

        def decorate(model_class: M) -> M:
            refuse_built_in(name, model_class)
            return MODELS.add(name, model_class)

        return decorate

    @staticmethod
    def get_class(name: str) -> type[SpeculatorModel]:
        """Returns the model class of algorithm `name`, importing its folder on first look-up."""
        return MODELS.get(name)

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> SpeculatorModel:
        """Builds the model from the verifier's config and all training arguments."""
        raise ContractError(
            missing_part(cls, "from_training_args(cls, verifier_config, **kwargs)", "returns the model")
        )

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what `forward` is given besides the batch, in training and in validation."""
        return {}, {}

    @staticmethod
    def align(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Shifts tokens and hidden states of one document before it is packed; by default nothing is shifted.

        Args:
            sample: what `forward` receives, by name, without the leading 1 and without `document_ids`: [n, ...] each.

        Returns:
            The same names; lengths may differ from n, the number of supervised tokens may not.
        """
        return sample

    def replay(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> Iterator[torch.Tensor]:
        """Yields draft logits for exact acceptance; see `speculators.drafter.Replays`."""
        raise ContractError(
            missing_part(type(self), "replay", "an iterator over K depths of draft logits [S, D], see SpeculatorModel")
        )

    def draft(self) -> Drafter:
        """Returns a drafter (speculators.drafter) that decodes with this model."""
        raise ContractError(
            missing_part(type(self), "draft", "a Drafter with begin, propose and advance, see speculators/drafter.py")
        )

    def share_verifier(self, folder: Path) -> None:
        """Takes from the verifier what a checkpoint of this algorithm leaves out; by default it leaves out nothing."""

    @classmethod
    def missing_hooks(cls) -> tuple[str, ...]:
        """Returns the hooks that acceptance cannot be measured without and that the algorithm does not have."""
        return tuple(hook for hook in ("replay", "draft") if getattr(cls, hook) is getattr(SpeculatorModel, hook))

    @property
    def draft_to_target(self) -> torch.Tensor:
        """[D] int64, the verifier's id of each draft id."""
        # Not by state_dict(): FSDP2's hook on it would shard a model again that evaluation has gathered.
        offsets = dict(self.named_buffers()).get("d2t")
        if offsets is None:
            return torch.arange(self.config.draft_vocab_size)
        return torch.arange(len(offsets), device=offsets.device) + offsets

    def save_pretrained(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors.

        Args:
            folder: is created.
            state: full tensors by name where the model itself holds shards; None for its own.

        Raises:
            ArtifactError: the weights cannot be written (a full disk).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.saved_names(state if state is not None else self.state_dict())
        # safetensors refuses tensors that share memory (a tied head), so each gets its own.
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        self.config.save(folder)
        if not _takes_config(type(self)):
            (folder / REBUILD_FILE).write_text(json.dumps(self.rebuild_args, indent=2) + "\n", encoding="utf-8")
            _write_tensors(self.rebuild_tensors, folder / REBUILD_TENSORS_FILE)
        _write_tensors(owned, folder / WEIGHTS_FILE)

    def saved_names(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the part of a state dict that belongs to the checkpoint."""
        return {name: tensor for name, tensor in state.items() if not name.startswith(self.not_saved or ("\0",))}

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, verifier: Path | None = None) -> SpeculatorModel:
        """Loads a saved speculator of any registered algorithm, ready to draft, in the widest dtype that is saved.

        Args:
            verifier: its verifier's folder, for algorithms that share weights with it; None takes the one that
                config.json names.

        Raises:
            ArtifactError: config or weights are missing or damaged; a tensor is missing, unknown or of another shape.
            VerifierError: the verifier's tensors are wanted and are not there.
        """
        folder = Path(folder)
        model = cls.from_saved(folder)
        if type(model).share_verifier is not SpeculatorModel.share_verifier:
            model.share_verifier(verifier or _verifier_folder(model.config, folder))
        model.eval().requires_grad_(False)
        return model

    @classmethod
    def from_saved(cls, folder: Path) -> SpeculatorModel:
        """Loads what is saved and no more: what it shares with its verifier is not filled in, so it cannot draft.

        Raises:
            ArtifactError: as `from_pretrained`.
        """
        config = read_config(folder)
        model = rebuild(config, folder)
        _load(model, read_weights(folder), folder)
        return model


def read_config(folder: Path) -> SpeculatorModelConfig:
    """Reads a speculator's config.json into its algorithm's config class.

    Raises:
        ArtifactError: not a speculator's config.json, or values that its algorithm does not take.
    """
    path = folder / "config.json"
    raw = VerifierFacts.read(path).to_dict()
    if "speculators_model_type" not in raw:
        raise ArtifactError(f"{path}: no 'speculators_model_type': this is not a speculator")
    config_class = SpeculatorModelConfig.get_class(raw["speculators_model_type"])
    found = config_class.refusals(raw)
    found += [
        f"does not say {key}: write in what the draft was trained with, each program has a default of its own"
        for key in config_class.must_say
        if not raw.get(key)
    ]
    plain = {key: value for key, value in raw.items() if key not in {*_FOREIGN_KEYS, *config_class.others}}
    config, problems = structure(plain, config_class)
    found += [str(problem) for problem in problems]
    if config is None or found:
        raise ArtifactError("\n".join(f"{path}: {words}" for words in found))
    return config


def _verifier_folder(config: SpeculatorModelConfig, folder: Path) -> Path:
    named = config.speculators_config.verifier.name_or_path if config.speculators_config else ""
    found = Path(named)
    if not (named and found.is_dir()):
        raise ArtifactError(
            f"{folder}: its checkpoint leaves out what the verifier has, and the verifier {named!r} is no folder here",
            hint="download the verifier, and give its folder: from_pretrained(folder, verifier=...)",
        )
    return found


def missing_part(model_class: type, part: str, gives: str) -> str:
    return f"{model_class.__module__}.{model_class.__qualname__} has no {part}; it must give {gives}"


def _takes_config(model_class: type[SpeculatorModel]) -> bool:
    """Whether `model_class(config)` builds the model: its __init__ requires one argument, named config."""
    parameters = list(inspect.signature(model_class).parameters.values())
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in fixed]
    return bool(parameters) and parameters[0].name == "config" and len(required) <= 1


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ArtifactError(f"{path}: cannot be written: {error}", hint="is the disk full?") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a saved speculator; raises ArtifactError where they are missing or damaged."""
    return _read_tensors(folder / WEIGHTS_FILE)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        # Copies: the file's own memory is not aligned, and products over it differ in the last bit.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there are no weights here") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged: {error}", hint="export or copy the speculator again") from None


def rebuild(config: SpeculatorModelConfig, folder: Path) -> SpeculatorModel:
    """Builds the model of a config.json, its weights not read yet.

    Args:
        folder: of the checkpoint, which has what an algorithm needs that is not built from its config alone.

    Raises:
        ArtifactError: that is missing or damaged, or no model can be built of the config's values.
    """
    try:
        return _rebuild(config, folder)
    except SpeculatorsError:
        raise
    # What wrong values lead to inside an algorithm's own code, or inside transformers, can be anything.
    except Exception as error:
        raise ArtifactError(
            f"{folder}: no model can be built from its config.json: {type(error).__name__}: {error}",
            hint="compare it with the verifier's config.json",
        ) from error


def _rebuild(config: SpeculatorModelConfig, folder: Path) -> SpeculatorModel:
    model_class = SpeculatorModel.get_class(config.speculators_model_type)
    if _takes_config(model_class):
        return model_class(config)
    path = folder / REBUILD_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: missing or damaged; {model_class.__qualname__} cannot be built from its config alone"
        raise ArtifactError(message) from error
    tensors = _read_tensors(folder / REBUILD_TENSORS_FILE)
    kwargs = {**kept["kwargs"], **tensors, **attrs.asdict(config, recurse=False)}
    model = model_class.from_training_args(VerifierFacts(kept["verifier_config"]), **kwargs)
    model.config, model.rebuild_args, model.rebuild_tensors = config, kept, tensors
    return model


def _load(model: SpeculatorModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = model.saved_names(model.state_dict())
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    shapes = [
        f"{name} is {list(tensors[name].shape)}, the config says {list(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if wanted[name].shape != tensors[name].shape
    ]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    if problems + shapes:
        raise ArtifactError(f"{folder / WEIGHTS_FILE}: {'; '.join(problems + shapes)}")
    model.load_state_dict(tensors, strict=False, assign=True)
    # Frozen tensors may be narrower than trained ones; a model computes in one dtype.
    floating = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    model.to(max(floating, key=lambda dtype: dtype.itemsize, default=torch.float32))


def _find(name: str) -> None:
    """Imports the `core` beside the algorithm's config, which registers the model."""
    package = SpeculatorModelConfig.get_class(name).__module__.rpartition(".")[0]
    if package and importlib.util.find_spec(f"{package}.core") is not None:
        importlib.import_module(f"{package}.core")


MODELS: Registry[Any] = Registry("model of algorithm", find=_find)


# Parts of the contract that plug-ins and their tests import from here; `contract` imports this module, so they are
# looked up when they are used.
_IN_CONTRACT = ("build_model", "check_contract", "trainer_kwargs")


def __getattr__(name: str) -> Any:
    if name in _IN_CONTRACT:
        return getattr(importlib.import_module("speculators.contract"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
