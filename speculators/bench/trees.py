"""Exact replay of drafted trees at T = 0, from one teacher-forced pass for all shapes.

Whether a round that begins at an anchor accepts y_1 .. y_j depends on its tree alone: it does if a path of the tree is
y_1 .. y_j. The logits along that path are those of the teacher-forced pass, whose input are the same tokens.

* A static tree takes tokens by their ranks. The rank of each y_j among the draft's tokens says whether the tree holds
  it below y_1 .. y_{j-1}, and the siblings do not matter.
* A dynamic tree takes the most likely nodes of all, so its siblings' descendants matter, and with them logits below
  tokens that are not y. Replay knows these only where the logits at one depth are the same below all nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from speculators.bench.packs import Pack, packs
from speculators.bench.replay import Replayed, ShapedByK
from speculators.bench.rows import JudgedResponse
from speculators.chunks import CHUNKS
from speculators.decoding.trees import Likely, grow, most_likely
from speculators.drafter import IndependentSlots, Replays
from speculators.recipe.tree import DynamicTree, StaticTree, TreeShape


@attrs.frozen(eq=False)
class _Drafts:
    """The most likely drafts at each anchor of one response, given its own tokens.

    Attributes:
        tokens: [L, K, W] int64, the verifier's ids, in falling order.
        log_q: [L, K, W] float32.
        emitted: [L, K] int64, the response's token at each depth; -1 past its end.
    """

    tokens: np.ndarray
    log_q: np.ndarray
    emitted: np.ndarray

    def cut(self, depth: int) -> _Drafts:
        """The first `depth` depths."""
        return _Drafts(self.tokens[:, :depth], self.log_q[:, :depth], self.emitted[:, :depth])


def is_replayed(model: Replays, shape: TreeShape) -> bool:
    """Whether replay is exact for trees of this shape."""
    return isinstance(shape, StaticTree) or (isinstance(model, IndependentSlots) and model.independent_slots)


def replay_trees(
    model: Replays,
    rows: Sequence[JudgedResponse],
    shapes: Sequence[TreeShape],
    chain: Replayed,
    *,
    k_max: int,
    row_tokens: int = 2048,
) -> dict[str, Replayed]:
    """Replays trees, at T = 0.

    Args:
        model: the speculator, in evaluation mode.
        rows: responses judged at T = 0.
        shapes: those that `is_replayed`.
        chain: any replay of the same rows.
        k_max: the most levels of a dynamic tree.
        row_tokens: as in `replay`.

    Returns:
        By the shapes' names; `acceptance` is 1 where the tree has the response's token at that depth.
    """
    depths = {shape.name: shape.depth_within(k_max) for shape in shapes}
    width = max((shape.width for shape in shapes), default=0)
    # One pass gives all depths, unless drafts depend on how many are drafted.
    passes = {max(depths.values(), default=0): list(shapes)}
    if isinstance(model, ShapedByK) and model.shaped_by_k:
        passes = {depth: [shape for shape in shapes if depths[shape.name] == depth] for depth in depths.values()}
    tables: dict[str, list[np.ndarray]] = {shape.name: [] for shape in shapes}
    for depth, of_pass in passes.items():
        for pack in packs(rows, row_tokens) if of_pass else ():
            for drafts in _likely_drafts(model, pack, depth=depth, width=width):
                for shape in of_pass:
                    tables[shape.name].append(_table(shape, drafts.cut(depths[shape.name])))
    return {
        shape.name: attrs.evolve(chain, acceptance=tuple(tables[shape.name]), lengths=None, nodes=shape.nodes)
        for shape in shapes
    }


@torch.no_grad()
def _likely_drafts(model: Replays, rows: Sequence[JudgedResponse], *, depth: int, width: int) -> list[_Drafts]:
    """Finds the most likely drafts of each response of one pack."""
    pack, device = Pack.of(rows), model.draft_to_target.device
    places = torch.cat(pack.anchors).to(device)
    by_depth = []
    for logits in model.replay(**pack.batch(device), num_speculative_tokens=depth):  # [S, D]
        chunks = torch.split(places, max(1, CHUNKS[device.type].judged_elements // logits.shape[-1]))
        ids, log_q = zip(*(most_likely(logits[chunk], width) for chunk in chunks), strict=True)
        by_depth.append((model.draft_to_target[torch.cat(ids)].cpu(), torch.cat(log_q).cpu()))
    # [rounds of all responses, K, W]
    tokens, chances = (torch.stack(parts, dim=1) for parts in zip(*by_depth, strict=True))
    by_response = []
    parts = zip(rows, torch.split(tokens, pack.rounds), torch.split(chances, pack.rounds), strict=True)
    for row, own_tokens, own_chances in parts:
        answer = np.array([*row.response.answer, *[-1] * depth])
        ahead = 1 + np.arange(len(own_tokens))[:, None] + np.arange(own_tokens.shape[1])
        by_response.append(_Drafts(own_tokens.numpy(), own_chances.numpy(), answer[ahead]))
    return by_response


def _table(shape: TreeShape, drafts: _Drafts) -> np.ndarray:
    """Says whether the tree at each anchor has the response's tokens up to each depth, [L, depth] of zeros and ones."""
    return _static_table(shape, drafts) if isinstance(shape, StaticTree) else _dynamic_table(shape, drafts)


def _static_table(shape: StaticTree, drafts: _Drafts) -> np.ndarray:
    equal = drafts.tokens == drafts.emitted[..., None]
    outside = drafts.tokens.shape[2]
    ranks = np.where(equal.any(axis=-1), equal.argmax(axis=-1), outside)  # [L, depth]
    table = np.zeros(ranks.shape, dtype=np.float32)
    # The node of each anchor's path in the level above; -1 where the tree has none.
    node = np.zeros(len(ranks), dtype=np.int64)
    above = 1
    for depth, level in enumerate(shape.levels[: ranks.shape[1]]):
        # [nodes above + 1, ranks + 1]: the last row is that of node -1.
        below = np.full((above + 1, outside + 1), -1)
        for index, (parent, rank) in enumerate(level):
            below[parent, rank] = index
        node, above = below[node, ranks[:, depth]], len(level)
        table[:, depth] = node >= 0
    return table


def _dynamic_table(shape: DynamicTree, drafts: _Drafts) -> np.ndarray:
    table = np.zeros(drafts.emitted.shape, dtype=np.float32)
    for anchor, (tokens, log_q, emitted) in enumerate(zip(drafts.tokens, drafts.log_q, drafts.emitted, strict=True)):
        slots = iter([Likely(tokens[depth, None], log_q[depth, None]) for depth in range(len(tokens))])
        ids, parents = grow(next(slots), lambda *_, slots=slots: next(slots), shape, len(tokens))
        nodes = {pair: node for node, pair in enumerate(zip(parents.tolist(), ids.tolist(), strict=True))}
        node = -1
        for depth, token in enumerate(emitted.tolist()):
            if (node, token) not in nodes:
                break
            node = nodes[node, token]
            table[anchor, depth] = 1.0
    return table
