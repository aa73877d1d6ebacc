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


def _check_kinds(raw: Any, source: str) -> None:
    """Raises VerifierError that lists every unusable value; null counts as missing."""
    if not isinstance(raw, Mapping):
        raise VerifierError(f"{source}: must be a JSON object, got a {type(raw).__name__}")
    values = {key: raw[key] for key in (*_SIZES, *_TABLES) if raw.get(key) is not None}
    wrong = [
        f"{key} must be a table, got {values[key]!r}" for key in _TABLES if not isinstance(values.get(key, {}), Mapping)
    ]
    for key in _SIZES:
        # Not isinstance: True is an int, and 64.0 would pass as a size until the first tensor is made.
        if key in values and not (type(values[key]) is int and values[key] > 0):
            wrong.append(f"{key} must be an integer > 0, got {values[key]!r}")
    if wrong:
        raise VerifierError(f"{source}: {'; '.join(wrong)}", hint="is this the config.json of a language model?")


class VerifierFacts(Mapping[str, Any]):
    """A frozen view of a verifier's config.json that keeps Hugging Face's attribute names.

    Values of a text model nested in a multimodal config (`text_config`) appear at the top. `head_dim`,
    `num_key_value_heads` and `rope_parameters` are filled in as transformers does where an older file omits them.

    Raises:
        VerifierError: a size is not an integer > 0, or a table is not a table. Missing keys are allowed.
        AttributeError: on access to a key that the file does not have; names the file.

    Example:
        VerifierFacts.read(Path("verifier/config.json")).hidden_size
    """

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json") -> None:
        _check_kinds(raw, source)
        flat = {**raw, **(raw.get("text_config") or {})}
        _check_kinds(flat, source)
        if "rope_parameters" not in flat and "rope_theta" in flat:
            scaling = flat.get("rope_scaling") or {}
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            flat["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": flat["rope_theta"]}
        if flat.get("hidden_size") and flat.get("num_attention_heads"):
            flat["head_dim"] = flat.get("head_dim") or flat["hidden_size"] // flat["num_attention_heads"]
            flat["num_key_value_heads"] = flat.get("num_key_value_heads") or flat["num_attention_heads"]
        object.__setattr__(self, "_raw", MappingProxyType(dict(raw)))
        object.__setattr__(self, "_flat", MappingProxyType(flat))
        object.__setattr__(self, "source", source)

    @classmethod
    def read(cls, path: Path) -> VerifierFacts:
        """Reads a config.json; raises ArtifactError if it is missing or is not JSON."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), str(path))
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
        if name.startswith("__") or name not in self._flat:
            raise AttributeError(f"{self.__dict__.get('source', 'config.json')} has no {name!r}")
        return self._flat[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("the view of the verifier's config is frozen")

    def __getitem__(self, key: str) -> Any:
        return self._flat[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flat)

    def __len__(self) -> int:
        return len(self._flat)

    def __reduce__(self) -> tuple[Any, ...]:
        return (VerifierFacts, (dict(self._raw), self.source))

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, unchanged."""
        return dict(self._raw)
