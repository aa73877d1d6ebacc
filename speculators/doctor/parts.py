"""The parts of a draft model by their place in its tree: what lies beside what, and other values for a while.

Nothing depends on the algorithm. Names of parts are the ones that checkpoints share (q_proj, o_proj, gate_proj, norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise

import attrs
import torch
from torch import nn

# New values of some tensors, by name.
Values = dict[str, torch.Tensor]


@attrs.frozen(eq=False)
class ModelPart:
    """A module whose tensors are saved in the checkpoint, with those of the modules below it.

    Attributes:
        name: in the model's tree, such as `layers.0.self_attn.k_proj`.
        tensors: its values by the rest of their name, such as `weight`.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def parent(self) -> str:
        """Name of the module above."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The name without the numbers of layers, the same for all layers."""
        return ".".join("*" if word.isdecimal() else word for word in self.name.split("."))

    @property
    def matrix(self) -> torch.Tensor | None:
        """The weight, if it is one matrix [out, in]."""
        weight = self.tensors.get("weight")
        return weight if weight is not None and weight.ndim == 2 else None

    @property
    def is_norm(self) -> bool:
        """Whether this looks like a norm: one weight per component, and no matrix."""
        return set(self.tensors) <= {"weight", "bias"} and all(one.ndim == 1 for one in self.tensors.values())

    def values(self, tensors: Mapping[str, torch.Tensor]) -> Values:
        """New values for this part's tensors, by full name."""
        return {f"{self.name}.{key}": tensor for key, tensor in tensors.items()}

    def like(self, other: ModelPart) -> bool:
        """Whether the other part has tensors of the same names and shapes, with different values."""
        mine, theirs = self.tensors, other.tensors
        same = {key: one.shape for key, one in mine.items()} == {key: one.shape for key, one in theirs.items()}
        return same and any(not torch.equal(one, theirs[key]) for key, one in mine.items())


def leaves(model: nn.Module, saved: Sequence[str]) -> list[ModelPart]:
    """Lists the modules that own tensors of the checkpoint, in the order of the tree."""
    names = set(saved)
    found_parts = []
    for name, module in model.named_modules():
        own = {key: one.detach() for key, one in module.named_parameters(recurse=False) if f"{name}.{key}" in names}
        if own and name:
            found_parts.append(ModelPart(name, own))
    return found_parts


def numbered(model: nn.Module, saved: Sequence[str]) -> list[list[ModelPart]]:
    """Lists the entries of each ModuleList, with the checkpoint's tensors below them."""
    names = set(saved)
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            entries = [(f"{name}.{index}", entry) for index, entry in enumerate(module)]
            lists.append([ModelPart(full, _below(entry, full, names)) for full, entry in entries])
    return [parts for parts in lists if all(part.tensors for part in parts)]


def _below(module: nn.Module, name: str, names: set[str]) -> dict[str, torch.Tensor]:
    return {key: one.detach() for key, one in module.named_parameters() if f"{name}.{key}" in names}


def siblings(parts: Sequence[ModelPart]) -> Iterator[tuple[ModelPart, ModelPart]]:
    """Yields the pairs of parts of one parent that could be mistaken for each other, except entries of a list."""
    for one, other in combinations(sorted(parts, key=lambda part: part.name), 2):
        if one.parent == other.parent and not one.leaf.isdecimal() and one.like(other):
            yield one, other


def neighbours(entries: Sequence[ModelPart]) -> Iterator[tuple[ModelPart, ModelPart]]:
    """Yields the neighbouring entries of a list that could be mistaken for each other."""
    for one, other in pairwise(entries):
        if one.like(other):
            yield one, other


def swapped(one: ModelPart, other: ModelPart) -> Values:
    """The values of two parts, exchanged."""
    return {**one.values(other.tensors), **other.values(one.tensors)}


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives some of a model's tensors other values within the block."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensors[name].data for name in values}
    # Copied first: new values may be views of the old ones.
    new = {name: value.to(before[name], copy=True).contiguous() for name, value in values.items()}
    try:
        for name, value in new.items():
            tensors[name].data = value
        yield
    finally:
        for name, value in before.items():
            tensors[name].data = value
