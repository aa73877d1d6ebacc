"""SpeculatorModel: the base of every algorithm's model, with saving and loading."""

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
from speculators.files.disk import honour_umask
from speculators.registry import Registry, qualified_name
from speculators.structure.converter import structure

M = TypeVar("M", bound="type[SpeculatorModel]")

WEIGHTS_FILE = "model.safetensors"
REBUILD_FILE = "training_args.json"
REBUILD_TENSORS_FILE = "training_args.safetensors"

# Keys that transformers writes beside ours; they mean nothing to a speculator.
_FOREIGN_KEYS = {"transformers_version", "dtype", "torch_dtype", "model_type", "auto_map", "has_no_defaults_at_init"}

# The arguments of every forward; models/README.md gives shapes and meaning.
BATCH_NAMES = (
    "hidden_states",
    "verifier_last_hidden_states",
    "input_ids",
    "loss_mask",
    "position_ids",
    "document_ids",
)


class SpeculatorModel(nn.Module):
    """A draft model: trained, saved, loaded and drafted with.

    A subclass sets `layers`, an nn.ModuleList whose entries are sharded one by one, and implements
    `from_training_args` and `forward`. The other hooks have defaults; those that measuring needs say what is missing.

    Example:
        model = SpeculatorModel.from_pretrained("runs/quickstart-1a2b3c4d/speculator")
        model.save_pretrained("copy")
    """

    layers: nn.ModuleList
    # Prefixes of state-dict names that belong to the verifier and are not part of the checkpoint.
    not_saved: tuple[str, ...] = ()
    # Prefixes of the tensors that training can take from another algorithm's checkpoint; () accepts only its own.
    backbone: tuple[str, ...] = ()

    def __init__(self, config: SpeculatorModelConfig | None = None) -> None:
        super().__init__()
        self.config: Any = config
        self.rebuild_args: dict[str, Any] = {}
        self.rebuild_tensors: dict[str, torch.Tensor] = {}

    @staticmethod
    def register(name: str) -> Callable[[M], M]:
        """Class decorator that registers a model under `name`.

        Raises:
            RegistryError: the name is taken, or is that of a built-in algorithm.
        """

        def decorate(model_class: M) -> M:
            refuse_built_in(name, model_class)
            return MODELS.add(name, model_class)

        return decorate

    @staticmethod
    def get_class(name: str) -> type[SpeculatorModel]:
        """Looks up the model class of algorithm `name`, importing its folder the first time."""
        return MODELS.get(name)

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> SpeculatorModel:
        """Builds the model from the verifier's config and all training arguments."""
        raise ContractError(
            missing_part(cls, "from_training_args(cls, verifier_config, **kwargs)", "it must return the model")
        )

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of `forward` besides the batch: a dict for training and one for validation."""
        return {}, {}

    @staticmethod
    def align(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Shifts tokens and hidden states of one document before it is packed; by default shifts nothing.

        Args:
            sample: the arguments of `forward` by name, without the leading 1 and without `document_ids`: [n, ...] each.

        Returns:
            The same names. Lengths may differ from n; the number of supervised tokens may not.
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
            missing_part(
                type(self),
                "replay",
                "it must return an iterator over K depths of draft logits [S, D], see speculators/drafter.py",
            )
        )

    def draft(self) -> Drafter:
        """Makes a drafter (see `speculators.drafter`) that decodes with this model."""
        raise ContractError(
            missing_part(
                type(self),
                "draft",
                "it must return a Drafter with begin, propose and advance, see speculators/drafter.py",
            )
        )

    def share_verifier(self, folder: Path) -> None:
        """Loads the weights that a checkpoint of this algorithm shares with its verifier; by default there are none."""

    @classmethod
    def missing_hooks(cls) -> tuple[str, ...]:
        """The hooks that the algorithm lacks and that measuring acceptance needs."""
        return tuple(hook for hook in ("replay", "draft") if getattr(cls, hook) is getattr(SpeculatorModel, hook))

    @property
    def draft_to_target(self) -> torch.Tensor:
        """[D] int64, the verifier's id of each draft id."""
        # Not through state_dict(): FSDP2's hook on it would shard the model again after evaluation has gathered it.
        offsets = dict(self.named_buffers()).get("d2t")
        if offsets is None:
            # On the model's device: it indexes the draft's choices there, at every evaluation and every round.
            return torch.arange(self.config.draft_vocab_size, device=next(self.parameters()).device)
        return torch.arange(len(offsets), device=offsets.device) + offsets

    def save_pretrained(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors.

        Args:
            folder: created if missing.
            state: full tensors by name, for a model that holds only shards; None for the model's own.

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
        """The part of a state dict that belongs to the checkpoint."""
        return {name: tensor for name, tensor in state.items() if not name.startswith(self.not_saved or ("\0",))}

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, verifier: Path | None = None) -> SpeculatorModel:
        """Loads a saved speculator of any registered algorithm, ready to draft, in the widest dtype of its file.

        Args:
            folder: contains config.json and model.safetensors.
            verifier: the verifier's folder, for algorithms that share weights with it; None for the one that
                config.json names.

        Raises:
            ArtifactError: config or weights are missing or damaged; a tensor is missing, unknown or of another shape.
            VerifierError: the verifier lacks a tensor that the speculator shares with it.
        """
        folder = Path(folder)
        model = cls.from_saved(folder)
        if type(model).share_verifier is not SpeculatorModel.share_verifier:
            model.share_verifier(verifier or _verifier_folder(model.config, folder))
        model.eval().requires_grad_(False)
        return model

    @classmethod
    def from_saved(cls, folder: Path) -> SpeculatorModel:
        """Loads only the saved tensors; a model that shares others with its verifier cannot draft yet.

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
        ArtifactError: not a speculator's config.json, or values that its algorithm rejects; lists all of them.
    """
    path = folder / "config.json"
    raw = VerifierFacts.read(path).to_dict()
    if "speculators_model_type" not in raw:
        raise ArtifactError(f"{path}: no 'speculators_model_type': this is not a speculator")
    config_class = SpeculatorModelConfig.get_class(raw["speculators_model_type"])
    faults = config_class.refusals(raw)
    faults += [
        f"lacks {key}: add the value that the draft was trained with, since programs differ in their defaults"
        for key in config_class.must_say
        if not raw.get(key)
    ]
    plain = {key: value for key, value in raw.items() if key not in {*_FOREIGN_KEYS, *config_class.unsupported}}
    config, problems = structure(plain, config_class)
    faults += [str(problem) for problem in problems]
    if config is None or faults:
        raise ArtifactError("\n".join(f"{path}: {fault}" for fault in faults))
    return config


def _verifier_folder(config: SpeculatorModelConfig, folder: Path) -> Path:
    name = config.speculators_config.verifier.name_or_path if config.speculators_config else ""
    if not (name and Path(name).is_dir()):
        raise ArtifactError(
            f"{folder}: the checkpoint omits the weights that it shares with its verifier, and the verifier in its "
            f"config.json, {name!r}, is not a folder on this machine",
            hint="download the verifier and pass its folder: from_pretrained(folder, verifier=...)",
        )
    return Path(name)


def missing_part(model_class: type, part: str, requirement: str) -> str:
    """The message about a hook that a model class lacks."""
    return f"{qualified_name(model_class)} has no {part}; {requirement}"


def _takes_config(model_class: type[SpeculatorModel]) -> bool:
    """Whether `model_class(config)` builds the model: its __init__ requires one argument, named config."""
    parameters = list(inspect.signature(model_class).parameters.values())
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in fixed]
    return bool(parameters) and parameters[0].name == "config" and len(required) <= 1


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        honour_umask(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: cannot be written: {error}", hint="is the disk full?") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a saved speculator; raises ArtifactError if they are missing or damaged."""
    return _read_tensors(folder / WEIGHTS_FILE)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        # Cloned because the file's memory is not aligned, and products over unaligned memory differ in the last bit.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there are no weights here") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged: {error}", hint="export or copy the speculator again") from None


def rebuild(config: SpeculatorModelConfig, folder: Path) -> SpeculatorModel:
    """Builds the model that a config.json describes, with weights still to be loaded.

    Args:
        folder: the checkpoint's; it also has the training arguments of models that a config alone cannot build.

    Raises:
        ArtifactError: those arguments are missing or damaged, or no model can be built from the config's values.
    """
    try:
        return _rebuild(config, folder)
    except SpeculatorsError:
        raise
    # Wrong values can raise anything inside an algorithm's own code, or inside transformers.
    except Exception as error:
        raise ArtifactError(
            f"{folder}: no model can be built from its config.json: {type(error).__name__}: {error}",
            hint="compare it with the verifier's config.json; spec import reads what other projects write",
        ) from error


def _rebuild(config: SpeculatorModelConfig, folder: Path) -> SpeculatorModel:
    model_class = SpeculatorModel.get_class(config.speculators_model_type)
    if _takes_config(model_class):
        return model_class(config)
    path = folder / REBUILD_FILE
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: missing or damaged; {qualified_name(model_class)} cannot be built from its config alone"
        raise ArtifactError(message) from error
    tensors = _read_tensors(folder / REBUILD_TENSORS_FILE)
    # The config goes last: whoever edits config.json expects its values to count.
    kwargs = {**arguments["kwargs"], **tensors, **attrs.asdict(config, recurse=False)}
    model = model_class.from_training_args(VerifierFacts(arguments["verifier_config"]), **kwargs)
    model.config, model.rebuild_args, model.rebuild_tensors = config, arguments, tensors
    return model


def _load(model: SpeculatorModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    own = model.saved_names(model.state_dict())
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [
        f"{name} is {list(tensors[name].shape)}, the config says {list(own[name].shape)}"
        for name in sorted(set(own) & set(tensors))
        if own[name].shape != tensors[name].shape
    ]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    if problems + shapes:
        raise ArtifactError(f"{folder / WEIGHTS_FILE}: {'; '.join(problems + shapes)}")
    model.load_state_dict(tensors, strict=False, assign=True)
    # Frozen tensors may be saved in a narrower dtype than trained ones, but a model computes in one.
    floating = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    model.to(max(floating, key=lambda dtype: dtype.itemsize, default=torch.float32))


def _find(name: str) -> None:
    """Imports the `core` beside the algorithm's config, which registers the model."""
    package = SpeculatorModelConfig.get_class(name).__module__.rpartition(".")[0]
    if package and importlib.util.find_spec(f"{package}.core") is not None:
        importlib.import_module(f"{package}.core")


MODELS: Registry[Any] = Registry("model of algorithm", find=_find)


# Plug-ins import these from here. `contract` imports this module, so a plain import would be a cycle.
_IN_CONTRACT = ("build_model", "check_contract", "trainer_kwargs")


def __getattr__(name: str) -> Any:
    if name in _IN_CONTRACT:
        return getattr(importlib.import_module("speculators.contract"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
