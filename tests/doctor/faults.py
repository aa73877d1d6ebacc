"""Faults that strangers' checkpoints have, as changes of a folder; files alone show none of them.

They use only names of tensors that checkpoints share, so that the same list serves a tiny speculator and a real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from clinic import edit, weights

Tensors = dict[str, torch.Tensor]
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
Q, K, V, OUT = (f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP, DOWN = (f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@attrs.frozen
class Symptom:
    """A fault, the check that names it and a phrase of its evidence; `result` is the least that it must be."""

    tamper: Callable[[Path], None]
    check: str
    phrase: str
    result: str = "wrong"


def layer_ids(change: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda config: config.update({LAYER_IDS: change(config[LAYER_IDS])}))


def swap(one: str, other: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return weights(change)


def change_one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: change(tensors[name]).to(tensors[name].dtype)}))


def at_random(tensor: torch.Tensor) -> torch.Tensor:
    """Fresh numbers of the same mean size, as an initialisation draws them."""
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.rand(tensor.shape, generator=generator) - 1) * 3**0.5 * tensor.float().std()


def head_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["transformer_layer_config"]["head_dim"]


def by_head(names: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes tensors that are cut into heads [heads, d, in]."""

    def tamper(folder: Path) -> None:
        size = head_size(folder)

        def reorder(tensors: Tensors) -> None:
            for name in names:
                heads = tensors[name].unflatten(0, (-1, size))
                tensors[name] = change(heads).flatten(0, 1)

        weights(reorder)(folder)

    return tamper


def to_interleaved(heads: torch.Tensor) -> torch.Tensor:
    """Component i + d / 2 goes beside component i."""
    return heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def ungrouped(folder: Path) -> None:
    """Query head i, which shares key head i div group, moves to where it shares key head i mod kv_heads."""
    decoder = json.loads((folder / "config.json").read_text())["transformer_layer_config"]
    size, kv = decoder["head_dim"], decoder["num_key_value_heads"]

    def change(tensors: Tensors) -> None:
        grouped = tensors[Q].unflatten(0, (kv, -1, size))
        tensors[Q] = grouped.transpose(0, 1).flatten(0, 2)
        tensors[OUT] = tensors[OUT].unflatten(1, (kv, -1, size)).transpose(1, 2).flatten(1, 3)

    weights(change)(folder)


def state_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(1, (3, -1))[:, [1, 2, 0]].flatten(1)


def interleaved_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)


def halves(tensors: Tensors) -> None:
    for name in (Q, K, V):
        tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)


def map_off_by_one(tensors: Tensors) -> None:
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    moved = (ids + 1).clamp_max(len(tensors["t2d"]) - 1)
    tensors["d2t"] = moved - torch.arange(len(moved))
    tensors["t2d"] = torch.zeros_like(tensors["t2d"]).index_fill_(0, moved, True)


def eight_bits(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            scale = tensor.float().abs().max() / 127
            tensors[name] = ((tensor.float() / scale).round() * scale).to(tensor.dtype)


def misread(folder: Path) -> None:
    """Stores bfloat16 numbers, and calls them float16."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(torch.bfloat16).contiguous().view(torch.float16)

    weights(change)(folder)


def zeroed(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def shuffled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(0))]


NORM = "layers.0.hidden_norm.weight"
FAULTS: dict[str, Symptom] = {
    "layer ids one later": Symptom(
        layer_ids(lambda ids: [layer + 1 for layer in ids]), "alignment/layer ids", "layers one earlier than"
    ),
    "layer ids one earlier": Symptom(
        layer_ids(lambda ids: [layer - 1 for layer in ids]), "alignment/layer ids", "layers one later than"
    ),
    "one layer id off": Symptom(
        layer_ids(lambda ids: [*ids[:-1], ids[-1] + 1]), "alignment/layer ids", "one earlier than"
    ),
    "columns of the states permuted": Symptom(
        change_one("fc.weight", state_columns), "alignment/order of states", "the states in the order"
    ),
    "columns of the states interleaved": Symptom(
        change_one("fc.weight", interleaved_columns),
        "alignment/concatenated inputs",
        "of fc for 3 inputs are stored interleaved",
    ),
    "columns of the states shuffled": Symptom(change_one("fc.weight", shuffled), "alignment/acceptance", "unexplained"),
    "k and v swapped": Symptom(swap(K, V), "alignment/projections", "k_proj and .*v_proj are swapped"),
    "gate and up swapped": Symptom(swap(GATE, UP), "alignment/projections", "gate_proj and .*up_proj are swapped"),
    "o transposed": Symptom(change_one(OUT, torch.t), "alignment/projections", "o_proj is transposed"),
    "embedding and state swapped": Symptom(
        weights(halves), "alignment/concatenated inputs", "for 2 inputs are swapped"
    ),
    "rotary interleaved": Symptom(by_head((Q, K), to_interleaved), "alignment/rotary layout", "the interleaved rotary"),
    "query heads regrouped": Symptom(ungrouped, "alignment/heads", "the query heads were regrouped twice|i mod"),
    "key heads permuted": Symptom(by_head((K, V), lambda heads: heads.flip(0)), "alignment/heads", "in another order"),
    "norms minus one": Symptom(
        weights(lambda tensors: tensors.update({key: one - 1 for key, one in tensors.items() if "norm" in key})),
        "alignment/norm convention",
        r"norms multiply by \(1 \+ w\)",
    ),
    "norm all ones": Symptom(
        change_one(NORM, torch.ones_like), "loads/trained parts", "one value.*hidden_norm", "warning"
    ),
    "norm all zeros": Symptom(
        change_one(NORM, zeroed), "loads/trained parts", r"hidden_norm.weight \(all 0\)", "warning"
    ),
    "fc untrained": Symptom(change_one("fc.weight", at_random), "alignment/acceptance", "near chance"),
    "head at random": Symptom(change_one("lm_head.weight", at_random), "loads/head", "the head looks random"),
    "embeddings at random": Symptom(
        change_one("embed_tokens.weight", at_random), "loads/embeddings", "of another verifier, or random"
    ),
    "vocabulary off by one": Symptom(weights(map_off_by_one), "loads/head", "does not belong to this head"),
    "8 bits": Symptom(weights(eight_bits), "loads/rounding", "rounded to 8 bits", "warning"),
    "16-bit formats mistaken": Symptom(misread, "alignment/number format", "the numbers are bfloat16"),
}

# The same on matrices as wide as a real draft's, whose spectrum shows whether they were trained.
WIDE: dict[str, Symptom] = {
    "fc untrained": Symptom(change_one("fc.weight", at_random), "loads/trained parts", "random numbers: fc.weight"),
    "down untrained": Symptom(change_one(DOWN, at_random), "loads/trained parts", "down_proj", "warning"),
}
