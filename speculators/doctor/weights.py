"""Alternatives of the draft's weights: parts exchanged, transposed, reordered, or read by another convention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice

import torch

from speculators.doctor.alternative import RENAME, Alternative, Alternatives, with_values
from speculators.doctor.parts import ModelPart, Values, leaves, neighbours, numbered, siblings, swapped
from speculators.doctor.trials import DraftTrials

# With these limits an examination tries at most about 80 alternatives.
MOST_SWAPS, MOST_ORDERS = 12, 8
# Projections whose input is not a row of states, however wide it is.
INNER = ("o_proj", "down_proj")
Pair = tuple[ModelPart, ModelPart]


def parts_of(trials: DraftTrials) -> list[ModelPart]:
    """Lists the parts of the draft that its checkpoint holds."""
    return leaves(trials.model, list(trials.speculator.tensors))


def norms_in_place(trials: DraftTrials) -> Alternatives:
    """Two norms of a layer exchanged."""
    swaps = _swaps([part for part in parts_of(trials) if part.is_norm])
    return swaps or "no two norms of one layer have the same size and different values"


def projections(trials: DraftTrials) -> Alternatives:
    """Two projections of a layer exchanged, or a square one transposed."""
    matrices = [part for part in parts_of(trials) if not part.is_norm]
    others = _swaps(matrices) + _halves(matrices) + _transposed(matrices)
    return others or "no two projections of one layer have the same size, and none is square"


def _swaps(parts: Sequence[ModelPart]) -> list[Alternative]:
    """Exchanges each pair of siblings, in all layers at once and then in single ones."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for one, other in siblings(parts):
        groups.setdefault((one.place, other.place), []).append((one, other))
    singles = [[pair] for pairs in groups.values() if len(pairs) > 1 for pair in pairs]
    return [_swap(pairs) for pairs in islice([*groups.values(), *singles], MOST_SWAPS)]


def _swap(pairs: Sequence[Pair]) -> Alternative:
    one, other = pairs[0]
    where = f" in all {len(pairs)} layers" if len(pairs) > 1 else ""
    names = (one.leaf, other.leaf) if where else (one.name, other.name)
    return with_values(
        f"{names[0]} and {names[1]} swapped{where}",
        f"{names[0]} and {names[1]} are swapped{where}",
        RENAME,
        lambda: _merged(swapped(*pair) for pair in pairs),
    )


def _halves(parts: Sequence[ModelPart]) -> list[Alternative]:
    """Exchanges the halves of projections that hold gate and up in one."""
    fused = {
        f"{part.name}.{key}": tensor
        for part in parts
        for key, tensor in part.tensors.items()
        if "gate_up_proj" in f"{part.name}.{key}"
    }
    if not fused:
        return []
    # [.., 2 * inner, size]: the halves lie along the next to last axis of a matrix.
    return [
        with_values(
            "gate and up swapped",
            "the gate and up halves of gate_up_proj are swapped",
            "exchange the halves in model.safetensors, and check the order that the import stacks them in",
            lambda: {name: torch.cat(one.chunk(2, -2)[::-1], -2) for name, one in fused.items() if one.ndim > 1},
        )
    ]


def _transposed(parts: Sequence[ModelPart]) -> list[Alternative]:
    """Transposes square matrices, of all layers at once."""
    groups: dict[str, list[ModelPart]] = {}
    for part in parts:
        if part.matrix is not None and part.matrix.shape[0] == part.matrix.shape[1]:
            groups.setdefault(part.place, []).append(part)
    return [_transpose(square) for square in islice(groups.values(), MOST_ORDERS)]


def _transpose(square: Sequence[ModelPart]) -> Alternative:
    name = square[0].name if len(square) == 1 else square[0].place
    return with_values(
        f"{name} transposed",
        f"{name} is transposed",
        "transpose it in model.safetensors: a Linear's weight is [out, in]",
        lambda: {f"{part.name}.weight": part.tensors["weight"].T for part in square},
    )


def order_of_layers(trials: DraftTrials) -> Alternatives:
    """Neighbouring layers or heads of a list exchanged, in one list or in all of the same length."""
    lists = numbered(trials.model, list(trials.speculator.tensors))
    pairs = [[pair] for entries in lists for pair in neighbours(entries)]
    for length in {len(entries) for entries in lists}:
        same = [entries for entries in lists if len(entries) == length]
        for at in range(length - 1) if len(same) > 1 else ():
            # Lists of one length hold parts of the same entries: the block and the head of each depth, for example.
            pairs.append([(entries[at], entries[at + 1]) for entries in same if entries[at].like(entries[at + 1])])
    others = [_swap_entries(group) for group in islice(filter(None, pairs), MOST_ORDERS)]
    return others or "no list of layers has two entries of the same kind"


def _swap_entries(pairs: Sequence[Pair]) -> Alternative:
    names = " and ".join(f"{one.name} with {other.name}" for one, other in pairs)
    return with_values(
        f"{names} swapped",
        f"entries are in the wrong order: {names} must be swapped",
        RENAME,
        lambda: _merged(swapped(*pair) for pair in pairs),
    )


def concatenated(trials: DraftTrials) -> Alternatives:
    """The columns of projections that read several rows of states side by side, in another order."""
    size = trials.speculator.facts.hidden_size
    groups: dict[tuple[str, int], list[ModelPart]] = {}
    for part in parts_of(trials):
        if part.matrix is not None and part.leaf not in INNER:
            count, rest = divmod(part.matrix.shape[1], size)
            if count > 1 and not rest:
                groups.setdefault((part.parent, count), []).append(part)
    others = [one for (_, count), parts in groups.items() for one in _reordered(parts, count, size)]
    return others[: 2 * MOST_ORDERS] or "no projection reads several states side by side"


def _reordered(parts: Sequence[ModelPart], count: int, size: int) -> list[Alternative]:
    names = ", ".join(part.name for part in parts)
    columns = torch.arange(count * size)
    ways = {
        "interleaved": (
            "are stored interleaved, component by component, and read side by side",
            columns.view(size, count).T.flatten(),
        ),
        "interleaved back": ("were put side by side twice", columns.view(count, size).T.flatten()),
    }
    if count == 2:
        # The order of more inputs is that of the layers, which another check tries.
        ways = {"halves swapped": ("are swapped", torch.cat(columns.chunk(2)[::-1])), **ways}
    return [
        with_values(
            f"columns {what}",
            f"the columns of {names} for {count} inputs {means}",
            f"reorder the columns in model.safetensors: {count} blocks of {size}, one for each input",
            partial(_columns, parts, index),
        )
        for what, (means, index) in ways.items()
    ]


def _columns(parts: Sequence[ModelPart], index: torch.Tensor) -> Values:
    weights = {f"{part.name}.weight": part.tensors["weight"] for part in parts}
    return {name: weight[:, index.to(weight.device)] for name, weight in weights.items()}


def norm_convention(trials: DraftTrials) -> Alternatives:
    """Every norm's weight as 1 + w, or as w - 1."""
    norms = [part for part in parts_of(trials) if part.is_norm and "weight" in part.tensors]
    if not norms:
        return "the checkpoint has no norm"

    return [
        with_values(
            f"norm weights {step:+d}",
            means,
            f"add {step:+d} to the norms' weights in model.safetensors",
            partial(_added, norms, step),
        )
        for step, means in (
            (1, "norms multiply by (1 + w), but their weights are read as w"),
            (-1, "norms multiply by w, but 1 was added to their weights"),
        )
    ]


def _added(norms: Sequence[ModelPart], step: int) -> Values:
    return {f"{part.name}.weight": part.tensors["weight"] + step for part in norms}


def _merged(parts: Iterable[Values]) -> Values:
    return {name: tensor for part in parts for name, tensor in part.items()}
