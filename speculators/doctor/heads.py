"""Alternatives of attention heads: rotary layout, grouping of query heads, order of key heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
import torch

from speculators.doctor.alternative import Alternative, Alternatives, with_values
from speculators.doctor.inputs import orders
from speculators.doctor.parts import ModelPart, Values
from speculators.doctor.trials import DraftTrials
from speculators.doctor.weights import parts_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
CONVERSION = "convert q_proj and k_proj again, and permute the rows of each head exactly once"
ORDER = "reorder the heads in model.safetensors, and check how the import cuts or joins them"


@attrs.frozen(eq=False)
class HeadLayout:
    """The projections of one attention, cut into heads.

    Attributes:
        parts: q_proj, k_proj, v_proj, o_proj and, where they exist, q_norm and k_norm.
        size: components of a head.
        rotary: the first components, which are rotated.
        heads, kv_heads: number of query heads, and of key heads.
    """

    parts: dict[str, ModelPart]
    size: int
    rotary: int
    heads: int
    kv_heads: int

    def rows(self, name: str, index: torch.Tensor) -> Values:
        """Picks rows of a projection and of its bias."""
        return self.parts[name].values(
            {key: one[index.to(one.device)] for key, one in self.parts[name].tensors.items()}
        )

    def blocks(self, order: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Index of the rows of all heads, with the heads in another order."""
        return (torch.as_tensor(order)[:, None] * self.size + torch.arange(self.size)).flatten()

    def layout(self, index: torch.Tensor) -> Values:
        """Permutes the components of each head of queries and keys, and of their norms."""
        values: Values = {}
        for name, heads in (("q_proj", self.heads), ("k_proj", self.kv_heads)):
            values |= self.rows(name, (torch.arange(heads)[:, None] * self.size + index).flatten())
            if (norm := name.replace("proj", "norm")) in self.parts:
                values |= self.rows(norm, index)
        return values

    def grouping(self, order: torch.Tensor) -> Values:
        """Reorders query heads, in q_proj and in what o_proj reads."""
        index, o = self.blocks(order), self.parts["o_proj"]
        return {
            **self.rows("q_proj", index),
            f"{o.name}.weight": o.tensors["weight"][:, index.to(o.tensors["weight"].device)],
        }

    def kv(self, order: Sequence[int]) -> Values:
        """Reorders the heads of keys and values."""
        return {**self.rows("k_proj", self.blocks(order)), **self.rows("v_proj", self.blocks(order))}


def attentions(trials: DraftTrials) -> list[HeadLayout]:
    """Lists the attentions whose projections have the sizes of config.json."""
    decoder = trials.speculator.decoder
    size = int(decoder.get("head_dim") or 0)
    factor = float((decoder.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0)
    groups: dict[str, dict[str, ModelPart]] = {}
    for part in parts_of(trials):
        if part.leaf in (*PROJECTIONS, "q_norm", "k_norm"):
            groups.setdefault(part.parent, {})[part.leaf] = part
    return [
        HeadLayout(parts, size, int(size * factor) // 2 * 2, *counts)
        for parts in groups.values()
        if set(PROJECTIONS) <= set(parts) and (counts := _counts(parts, size))
    ]


def _counts(parts: dict[str, ModelPart], size: int) -> tuple[int, int] | None:
    """Counts query and key heads; None if the sizes are not those of plain attention."""
    matrices = [parts[name].matrix for name in PROJECTIONS]
    if not size or any(one is None for one in matrices):
        return None
    q, k, v, o = (one.shape for one in matrices if one is not None)
    plain = q[0] == o[1] and k[0] == v[0] and q[0] % size == 0 and k[0] % size == 0
    return (q[0] // size, k[0] // size) if plain else None


NO_HEADS = "the draft has no attention with q_proj, k_proj, v_proj and o_proj of config.json's head_dim"


def rotary_layout(trials: DraftTrials) -> Alternatives:
    """The components of each head in the order of the other rotary convention."""
    attention = attentions(trials)
    if not attention:
        return NO_HEADS

    return [
        with_values(
            "interleaved to halves",
            "q_proj and k_proj are in the interleaved rotary layout (pairs 2i, 2i + 1), and are read as halves",
            CONVERSION,
            partial(_all, attention, lambda one: one.layout(_to_halves(one))),
        ),
        with_values(
            "halves to interleaved",
            "the rows of q_proj and k_proj were permuted to the halves layout twice",
            CONVERSION,
            partial(_all, attention, lambda one: one.layout(_to_halves(one).argsort())),
        ),
    ]


def _to_halves(one: HeadLayout) -> torch.Tensor:
    rotary = torch.arange(one.rotary)
    return torch.cat((rotary[0::2], rotary[1::2], torch.arange(one.rotary, one.size)))


def head_grouping(trials: DraftTrials) -> Alternatives:
    """Query heads that share a key head, grouped the other way; key heads in another order."""
    attention = attentions(trials)
    if not attention:
        return NO_HEADS
    heads, kv_heads = attention[0].heads, attention[0].kv_heads
    same = all((one.heads, one.kv_heads) == (heads, kv_heads) for one in attention)
    if not same or kv_heads < 2:
        return f"{heads} query heads share {kv_heads} key head: there is no other order"
    return [*_groupings(attention), *_kv_orders(attention)]


def _groupings(attention: Sequence[HeadLayout]) -> Iterator[Alternative]:
    heads, kv_heads = attention[0].heads, attention[0].kv_heads
    group = heads // kv_heads
    if heads % kv_heads or group < 2:
        return
    tiled = torch.arange(heads).view(group, kv_heads).T.flatten()
    for what, means, new in (
        ("query heads tiled", f"query head i was trained with key head i mod {kv_heads}, not i div {group}", tiled),
        ("query heads tiled back", "the query heads were regrouped twice", tiled.argsort()),
    ):
        yield with_values(what, means, ORDER, partial(_all, attention, partial(HeadLayout.grouping, order=new)))


def _kv_orders(attention: Sequence[HeadLayout]) -> Iterator[Alternative]:
    for new in orders(range(attention[0].kv_heads))[:6]:
        yield with_values(
            f"key heads {list(new)}",
            f"the heads of k_proj and v_proj are in another order than those of q_proj; {list(new)} fits",
            ORDER,
            partial(_all, attention, partial(HeadLayout.kv, order=new)),
        )


def _all(attention: Sequence[HeadLayout], way: Callable[[HeadLayout], Values]) -> Values:
    return {name: tensor for one in attention for name, tensor in way(one).items()}
