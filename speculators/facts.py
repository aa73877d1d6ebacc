"""A frozen view of a verifier's config.json. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from speculators.errors import ArtifactError, VerifierError

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_TABLES = ("text_config", "rope_scaling", "rope_parameters")
_LISTS = ("architectures", "layer_types")
# Architectures' names for how many experts there are, and how many of them a token meets. Hunyuan lists them by layer.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERTS_MET = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_COUNTS = ("kv_lora_rank", "n_routed_experts")
_COUNTS_BY_LAYER = ("num_experts", "num_local_experts", "moe_intermediate_size", *_EXPERTS_MET)
# A file that was saved as a difference omits the values that its class has by default: these are asked of the class.
_FROM_CLASS = (*_SIZES, "intermediate_size", "rms_norm_eps", "hidden_act", "rope_parameters")
# Families whose older files need no class: a missing head_dim is hidden_size / heads, there are as many key heads as
# heads, and rope_theta is the whole rotary embedding. Listed so that light commands do not import transformers; a test
# compares them with it.
PLAIN_HEAD_DIM = ("cohere", "cohere2", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_moe")
PLAIN_KEY_HEADS = ("cohere", "granite", "llama", "olmo2", "phi3")
PLAIN_ROPE = ("cohere", "gemma", "granite", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "qwen3_moe")
# With one of these beside rope_theta, nothing of the rotary embedding is left to the class.
_ROPE_BESIDE = ("rope_scaling", "partial_rotary_factor")
_REASON_LENGTH = 240


def _check_kinds(raw: Any, source: str) -> None:
    """Raises VerifierError that lists every unusable value; null counts as missing."""
    if not isinstance(raw, Mapping):
        raise VerifierError(f"{source}: must be a JSON object, got a {type(raw).__name__}")
    values = {key: raw[key] for key in (*_SIZES, *_COUNTS, *_TABLES) if raw.get(key) is not None}
    wrong = [
        f"{key} must be a table, got {values[key]!r}" for key in _TABLES if not isinstance(values.get(key, {}), Mapping)
    ]
    wrong += [
        f"{key} must be a list of strings, got {raw[key]!r}"
        for key in _LISTS
        if raw.get(key) is not None and not _is_strings(raw[key])
    ]
    wrong += [
        f"{key} must be an integer >= 0, or a list of them, got {raw[key]!r}"
        for key in _COUNTS_BY_LAYER
        if raw.get(key) is not None and not _is_counts(raw[key])
    ]
    if not isinstance(raw.get("model_type") or "", str):
        wrong.append(f"model_type must be a string, got {raw['model_type']!r}")
    for key in (*_SIZES, *_COUNTS):
        # Not isinstance: True is an int, and 64.0 would pass as a size until the first tensor is made.
        least = 1 if key in _SIZES else 0
        if key in values and not (type(values[key]) is int and values[key] >= least):
            wrong.append(f"{key} must be an integer > {least - 1}, got {values[key]!r}")
    if wrong:
        raise VerifierError(f"{source}: {'; '.join(wrong)}", hint="is this the config.json of a language model?")


def _is_counts(value: Any) -> bool:
    """Whether a value is an integer >= 0, or a list of them."""
    return all(type(count) is int and count >= 0 for count in (value if isinstance(value, list) and value else [value]))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def reason(error: BaseException) -> str:
    """Shortens an error of transformers to a line: some list hundreds of class names."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_LENGTH else f"{text[:_REASON_LENGTH]}..."


class VerifierFacts(Mapping[str, Any]):
    """A frozen view of a verifier's config.json that keeps Hugging Face's attribute names.

    Values of a text model nested in a multimodal config (`text_config`) appear at the top. Sizes, norm, activation and
    rotary embedding that the file omits are those of transformers' class for its `model_type`, which is imported only
    then.

    Raises:
        VerifierError: a size is not an integer > 0, a table is not a table, or transformers rejects a value. Missing
            keys are allowed.
        AttributeError: on access to a key that neither the file nor its class has; names the file.

    Example:
        VerifierFacts.read(Path("verifier/config.json")).hidden_size
    """

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json", folder: Path | None = None) -> None:
        _check_kinds(raw, source)
        flat = {**raw, **(raw.get("text_config") or {})}
        _check_kinds(flat, source)
        kind = flat.get("model_type")
        # Gemma calls it hidden_activation.
        if not flat.get("hidden_act") and flat.get("hidden_activation"):
            flat["hidden_act"] = flat["hidden_activation"]
        plain_rope = kind is None or kind in PLAIN_ROPE or any(flat.get(key) for key in _ROPE_BESIDE)
        if "rope_parameters" not in flat and flat.get("rope_theta") and plain_rope:
            flat["rope_parameters"] = _older_rope(flat)
        if flat.get("hidden_size") and flat.get("num_attention_heads"):
            if not flat.get("head_dim") and (kind is None or kind in PLAIN_HEAD_DIM):
                flat["head_dim"] = flat["hidden_size"] // flat["num_attention_heads"]
            if not flat.get("num_key_value_heads") and (kind is None or kind in PLAIN_KEY_HEADS):
                flat["num_key_value_heads"] = flat["num_attention_heads"]
        object.__setattr__(self, "_raw", MappingProxyType(dict(raw)))
        object.__setattr__(self, "_flat", MappingProxyType(flat))
        object.__setattr__(self, "source", source)
        # Where the verifier's other files lie; None where config.json alone is known.
        object.__setattr__(self, "folder", folder)

    @classmethod
    def read(cls, path: Path) -> VerifierFacts:
        """Reads a config.json; raises ArtifactError if it is missing or is not JSON."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), str(path), path.parent)
        except FileNotFoundError:
            raise ArtifactError(f"{path}: there is no config.json here") from None
        except IsADirectoryError:
            raise ArtifactError(f"{path}: is a folder", hint="name the config.json in it") from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path}: not JSON: {error}") from None

    def __getattr__(self, name: str) -> Any:
        # pickle and copy look for __reduce__ and others before __init__ has run, when there is no _flat yet.
        if name.startswith("_") or name not in self:
            raise AttributeError(f"{self.__dict__.get('source', 'config.json')} has no {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("the view of the verifier's config is frozen")

    def __getitem__(self, key: str) -> Any:
        if key in _FROM_CLASS and self._flat.get(key) is None:
            if "_defaults" not in self.__dict__:
                object.__setattr__(self, "_defaults", self._class_values())
            if self.__dict__["_defaults"].get(key) is not None:
                return self.__dict__["_defaults"][key]
        return self._flat[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flat)

    def __len__(self) -> int:
        return len(self._flat)

    def __reduce__(self) -> tuple[Any, ...]:
        return (VerifierFacts, (dict(self._raw), self.source, self.folder))

    def experts(self) -> tuple[int, int]:
        """How many experts a layer has, and how many of them a token meets; (0, 0) without experts."""
        counts = [next((self[name] for name in names if self.get(name)), 0) for names in (_EXPERTS, _EXPERTS_MET)]
        total, met = (max(count) if isinstance(count, list) else count for count in counts)
        return (total, met) if total and met else (0, 0)

    def class_config(self) -> Any:
        """Makes transformers' config from the file, with the defaults of its class.

        Raises:
            KeyError: transformers does not know the file's `model_type`.
            VerifierError: transformers rejects a value; the message names the key.
        """
        kind = self._raw["model_type"]
        if not isinstance(kind, str):
            raise VerifierError(f"{self.source}: model_type must be a text, got {kind!r}")
        # Late: the classes import torch, and most files need none of them.
        from transformers import CONFIG_MAPPING
        from transformers.utils import logging

        config_class = CONFIG_MAPPING[kind]
        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            return config_class.from_dict(_with_floats(self.to_dict()))
        # transformers validates with classes of errors of its own, which change between versions.
        except Exception as error:
            raise VerifierError(f"{self.source}: transformers rejects it: {reason(error)}") from error
        finally:
            logging.set_verbosity(level)

    def _class_values(self) -> dict[str, Any]:
        """The text model's values with the defaults of its class; where there is none, what older files leave out."""
        try:
            text = self.class_config().get_text_config(decoder=True)
            # Not getattr alone: it refuses sizes that differ from layer to layer (Gemma 4's head_dim).
            own = vars(text)
            values = {key: own[key] if key in own else getattr(text, key, None) for key in _FROM_CLASS}
        except KeyError:
            values = {key: self._flat.get(key) for key in _FROM_CLASS}
            values["rope_parameters"] = _older_rope(self._flat) if self._flat.get("rope_theta") else None
        if values["hidden_size"] and values["num_attention_heads"]:
            values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
            values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
        return values

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, unchanged."""
        return dict(self._raw)


def _with_floats(value: Any) -> Any:
    """Decodes the numbers that JSON lacks as transformers writes them: {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if isinstance(text := value.get("__float__"), str) and len(value) == 1:
            return float(text)
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _older_rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as older files write it: theta beside an optional scaling."""
    scaling = flat.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {**scaling, "rope_type": kind, "rope_theta": flat["rope_theta"]}
