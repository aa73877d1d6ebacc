"""Formats in which others publish speculators: an algorithm's `layouts.py` lists them, `spec import` reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from speculators.errors import ArtifactError
from speculators.facts import VerifierFacts
from speculators.formats.names import TensorNames
from speculators.structure.converter import structure

if TYPE_CHECKING:
    import torch

# `spec validate` asks an algorithm's `layouts.py` which server reads a draft, and must start without torch.
Tensors: TypeAlias = "dict[str, torch.Tensor]"


@attrs.frozen(eq=False)
class PublishedCheckpoint:
    """A checkpoint that another project wrote, opened without reading its weights.

    Attributes:
        folder: where it lies.
        config: its config.json.
        shapes: tensor name -> shape.
        read: loads one tensor by its name.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]

    def has_tensors(self, *prefixes: str) -> bool:
        """Checks that every prefix starts some tensor's name; a leading "model." is ignored."""
        names = [name.removeprefix("model.") for name in self.shapes]
        return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    def error(self, *problems: str) -> ArtifactError:
        """Builds an error that lists the faults of its config.json, one line per problem."""
        return ArtifactError("\n".join(f"{self.folder / 'config.json'}: {problem}" for problem in problems))


def _unchanged(_: Any, tensors: Tensors) -> Tensors:
    return tensors


@attrs.frozen(kw_only=True)
class PublishedFormat:
    """One published format.

    Attributes:
        name: as users see it.
        fits: recognises a checkpoint of this format. At most one format may recognise a checkpoint.
        config: computes the fields of our config, and "speculative_tokens" (K), from a checkpoint and its verifier's
            facts. Raises ArtifactError for options that our algorithm does not have.
        names: of the tensors.
        from_verifier: prefixes of our names. Its files may leave these tensors out; they are then the verifier's.
        amend: converts tensors, already under our names, that the format stores in another form.
        tensors: reads all tensors under our names; None reads those listed in `names`.
    """

    name: str
    fits: Callable[[PublishedCheckpoint], bool]
    config: Callable[[PublishedCheckpoint, VerifierFacts], dict[str, Any]]
    names: TensorNames
    from_verifier: tuple[str, ...] = ()
    amend: Callable[[Any, Tensors], Tensors] = _unchanged
    tensors: Callable[[PublishedCheckpoint], Tensors] | None = None


def build_config(config_class: type, fields: Mapping[str, Any], source: PublishedCheckpoint) -> Any:
    """Builds our config from JSON values; raises ArtifactError that lists every value it rejects."""
    config, problems = structure(dict(fields), config_class)
    if config is None:
        raise source.error(*(str(problem) for problem in problems))
    return config
