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
    """Raises VerifierError with every value that cannot be computed with; null stands for a missing one."""
    if not isinstance(raw, Mapping):
        raise VerifierError(f"{source}: must be a JSON object, got a {type(raw).__name__}")
    held = {key: raw[key] for key in (*_SIZES, *_TABLES) if raw.get(key) is not None}
    wrong = [
        f"{key} must be a table, got {held[key]!r}" for key in _TABLES if not isinstance(held.get(key, {}), Mapping)
    ]
    for key in _SIZES:
        if key in held and not (type(held[key]) is int and held[key] > 0):
            wrong.append(f"{key} must be an integer > 0, got {held[key]!r}")
    if wrong:
        raise VerifierError(f"{source}: {'; '.join(wrong)}", hint="is this the config.json of a language model?")


class VerifierFacts(Mapping[str, Any]):
    """A frozen view of a verifier's config.json that keeps Hugging Face's attribute names.

    Text models nested in a multimodal config (`text_config`) are looked through. `head_dim`, `num_key_value_heads` and
    `rope_parameters` are filled in the way transformers does where an older file leaves them out.

    Raises:
        VerifierError: a size is not an integer > 0, or a table is none; a key that is missing is no error here.
        AttributeError: for a key that the file does not have, naming the file.
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
            raise ArtifactError(f"{path}: is a folder", hint="give the config.json in it") from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path}: not JSON: {error}") from None

    def __getattr__(self, name: str) -> Any:
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
        """Returns the file's content as it was."""
        return dict(self._raw)
