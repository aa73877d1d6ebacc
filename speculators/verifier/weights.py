"""Reads single tensors of a verifier's safetensors files. A missing tensor is an error, never initialised at random."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from speculators.errors import VerifierError
from speculators.facts import VerifierFacts
from speculators.verifier.head import HeadRules, VerifierHead
from speculators.verifier.sources import shard_index

__all__ = ["TensorReader", "VerifierHead", "load_embeddings", "load_head"]

# Prefixes of the text model in causal and multimodal checkpoints.
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "transformer.", "backbone.")
_HEADS = ("lm_head.", "language_model.lm_head.")
_EMBEDDINGS = ("embed_tokens.weight", "embeddings.weight")
_ROWS_AT_ONCE = 8192


class TensorReader:
    """Reads tensors of a Hugging Face folder (one safetensors file, or shards with an index) without loading the rest.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and what it names.

    Raises:
        VerifierError: there are no safetensors files, or one cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _weight_map(folder)

    def names(self) -> list[str]:
        """Lists the names of all tensors, sorted."""
        return sorted(self._files)

    def read(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Reads a tensor, or some of its rows, in the dtype of the file.

        Args:
            name: as in the file.
            rows: [R] int64, sorted ids of the rows to read; None for all.

        Raises:
            VerifierError: there is no such tensor, or it has too few rows.
        """
        if name not in self._files:
            raise VerifierError(f"{self.folder} has no tensor {name!r}")
        with _opened(self._files[name]) as file:
            if rows is None:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
            view = file.get_slice(name)
            count = view.get_shape()[0]
            if len(rows) and int(rows.max()) >= count:
                raise VerifierError(
                    f"{name} of {self.folder} has {count} rows, but row {int(rows.max())} was requested"
                )
            # Block by block: 8k rows of a head with 256k must not load the whole head.
            blocks = [
                view[start : start + _ROWS_AT_ONCE][rows[(rows >= start) & (rows < start + _ROWS_AT_ONCE)] - start]
                for start in range(0, count, _ROWS_AT_ONCE)
            ]
            return torch.cat(blocks)

    def find(self, *suffixes: str, prefixes: tuple[str, ...] = _PREFIXES) -> str:
        """Finds the full name of a text model's tensor; raises VerifierError with the names that it tried."""
        tried = [prefix + suffix for suffix in suffixes for prefix in prefixes]
        for name in tried:
            if name in self._files:
                return name
        raise VerifierError(f"{self.folder} has no tensor {' or '.join(map(repr, tried))}")


def load_embeddings(folder: Path) -> torch.Tensor:
    """Reads the verifier's input embeddings [V, H] in the file's dtype; raises VerifierError if they are missing."""
    reader = TensorReader(folder)
    return reader.read(reader.find(*_EMBEDDINGS))


def load_head(
    folder: Path, facts: VerifierFacts, *, rows: torch.Tensor | None = None, dtype: torch.dtype | None = torch.float32
) -> VerifierHead:
    """Reads the verifier's final norm and head, and nothing else, from its safetensors.

    Args:
        folder: the verifier's Hugging Face folder.
        facts: its config.json.
        rows: [R] int64, sorted target ids that the head is cut to; None for the whole vocabulary.
        dtype: of the result; None for that of the file.

    Raises:
        VerifierError: a tensor is missing, or the formula of the final norm is unknown.
    """
    rules = HeadRules.of(facts)
    reader = TensorReader(folder)
    head = reader.find(*_EMBEDDINGS) if rules.tied else reader.find("weight", prefixes=_HEADS)
    norm = reader.find(f"{rules.norm_name}.weight")
    for bias in (name.replace("weight", "bias") for name in (head, norm)):
        if bias in reader.names():
            raise VerifierError(f"{folder}: {bias}: heads and norms with a bias are not supported")
    return VerifierHead(reader.read(head, rows).to(dtype), reader.read(norm).to(dtype), rules)


def _weight_map(folder: Path) -> dict[str, Path]:
    if index := shard_index(folder):
        return {name: folder / file for name, file in index.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as shard:
            files.update(dict.fromkeys(shard.keys(), path))
    if not files:
        raise VerifierError(f"{folder} has no weights (*.safetensors)")
    return files


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise VerifierError(f"{path} is missing, truncated or not safetensors: {error}") from error
