"""Published formats that speculators of one algorithm come in: its `layouts.py` names, `spec import` reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.errors import ArtifactError
from speculators.facts import VerifierFacts
from speculators.formats.names import Names
from speculators.structure.converter import structure

Tensors = dict[str, torch.Tensor]


@attrs.frozen(eq=False)
class Source:
    """A checkpoint somebody else wrote, its weights unread.

    Attributes:
        folder: it is in.
        config: its config.json.
        shapes: of its tensors, by name.
        read: gives a tensor by name.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]

    def has(self, *beginnings: str) -> bool:
        """Returns whether each beginning is that of some tensor's name; a leading "model." does not count."""
        names = [name.removeprefix("model.") for name in self.shapes]
        return all(any(name.startswith(beginning) for name in names) for beginning in beginnings)

    def wrong(self, *problems: str) -> ArtifactError:
        """Returns the error that says what of its config.json cannot be taken over."""
        return ArtifactError("\n".join(f"{self.folder / 'config.json'}: {problem}" for problem in problems))


def _as_read(_: Any, tensors: Tensors) -> Tensors:
    return tensors


@attrs.frozen(kw_only=True)
class Foreign:
    """One format.

    Attributes:
        name: for people.
        fits: tells whether a source is of this format; at most one format says so.
        config: gives the fields of our config, and "speculative_tokens" (K), from a source and its verifier's facts;
            raises ArtifactError for what the algorithm here does not have.
        names: of the tensors.
        from_verifier: beginnings of our names that its files may leave out: they are the verifier's.
        amend: turns the tensors, named as ours, into ours where the format keeps them otherwise.
        tensors: reads all tensors, named as ours; None reads those that `names` has.
    """

    name: str
    fits: Callable[[Source], bool]
    config: Callable[[Source, VerifierFacts], dict[str, Any]]
    names: Names
    from_verifier: tuple[str, ...] = ()
    amend: Callable[[Any, Tensors], Tensors] = _as_read
    tensors: Callable[[Source], Tensors] | None = None


def build_config(config_class: type, fields: Mapping[str, Any], source: Source) -> Any:
    """Returns our config from JSON values; raises ArtifactError with all that it does not take."""
    config, problems = structure(dict(fields), config_class)
    if config is None:
        raise source.wrong(*(str(problem) for problem in problems))
    return config
