"""Drafts trees: a shape decides which of a draft's tokens become nodes, and a drafter gives their logits.

Levels grow one after the other. A static shape takes its ranks from the logits below each node. A dynamic one keeps the
N nodes of the highest likelihood: a node that is not among the best N so far never will be, and neither will those
below it, so that each level runs only the nodes that are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch

from speculators.drafter import Branches, DraftsTrees, Proposal
from speculators.recipe.tree import DynamicTree, StaticTree, TreeShape


@attrs.frozen(eq=False)
class Likely:
    """The most likely tokens below M nodes, in falling order.

    Attributes:
        ids: [M, W] int64, in the draft's vocabulary; or [1, W] where all nodes have the same.
        log_q: their log-probabilities, [M, W] or [1, W] float32.
    """

    ids: np.ndarray
    log_q: np.ndarray


# Takes the nodes of the level above by their parents (as `Branches.below`) and their tokens [M], as draft ids.
Below = Callable[[np.ndarray, np.ndarray], Likely]


def most_likely(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the `count` most likely ids of logits [n, D], all of them if D is less.

    Returns:
        Ids [n, W] in falling order, and their log-probabilities [n, W].
    """
    values, ids = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return ids, values - logits.logsumexp(dim=-1, keepdim=True)


class TreeDrafter:
    """Drafts trees of one shape; at temperature 0 only.

    Args:
        drafter: grows them.
        shape: of the tree in each round.
    """

    def __init__(self, drafter: DraftsTrees, shape: TreeShape) -> None:
        self._drafter, self._shape = drafter, shape
        self.target_layer_ids = drafter.target_layer_ids

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        """Starts a sequence; see `Drafter`."""
        return self._drafter.begin(tokens, hidden_states)

    def propose(
        self, state: Any, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a tree of up to `num_tokens` levels; see `Drafter`."""
        assert temperature == 0, "siblings are not sampled"
        branches = self._drafter.begin_tree(state, num_tokens)
        return draft_tree(branches, self._shape, num_tokens, self._drafter.draft_to_target)

    def advance(self, state: Any, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens that a round emitted; see `Drafter`."""
        self._drafter.advance(state, tokens, hidden_states)


def draft_tree(branches: Branches, shape: TreeShape, num_levels: int, draft_to_target: torch.Tensor) -> Proposal:
    """Drafts the tree of one round.

    Args:
        branches: of the round.
        num_levels: the most levels of a dynamic shape.
        draft_to_target: [D] int64, the verifier's id of each draft id.
    """
    device = draft_to_target.device

    def likely(logits: torch.Tensor) -> Likely:
        ids, log_q = most_likely(logits, shape.width)
        return Likely(ids.cpu().numpy(), log_q.cpu().numpy())

    def below(parents: np.ndarray, ids: np.ndarray) -> Likely:
        tokens = draft_to_target[torch.from_numpy(ids).to(device)]
        return likely(branches.below(torch.from_numpy(parents).to(device), tokens))

    ids, parents = grow(likely(branches.first()), below, shape, num_levels)
    return Proposal(draft_to_target[torch.from_numpy(ids).to(device)], torch.from_numpy(parents).to(device))


def grow(first: Likely, below: Below, shape: TreeShape, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Grows a tree.

    Args:
        first: the tokens that follow the last verified one.
        below: gives those below each node of a level.
        num_levels: the most levels of a dynamic shape.

    Returns:
        Draft ids and parents of its nodes, [N] int64, parents first; the parent -1 is the last verified token.
    """
    if isinstance(shape, StaticTree):
        return _grow_static(first, below, shape)
    return _grow_dynamic(first, below, shape, num_levels)


def _grow_static(likely: Likely, below: Below, shape: StaticTree) -> tuple[np.ndarray, np.ndarray]:
    rows = np.empty(0, dtype=np.int64)
    ids: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    # Place, among all nodes, of the first one in the level above.
    above = -1
    for level in shape.levels:
        if ids:
            likely = below(rows, ids[-1])
        rows, ranks = np.array(level, dtype=np.int64).T
        ids.append(np.broadcast_to(likely.ids, (int(rows.max()) + 1, likely.ids.shape[1]))[rows, ranks])
        parents.append(above + rows)
        above += len(ids[-2]) if len(ids) > 1 else 1
    return np.concatenate(ids), np.concatenate(parents)


def _grow_dynamic(likely: Likely, below: Below, shape: DynamicTree, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    # All nodes that were among the best so far, level by level.
    ids, score = likely.ids[0], likely.log_q[0]
    parents = np.full(len(ids), -1)
    # The newest level: its nodes, and the row of each one's parent in the level above.
    level, rows = np.arange(len(ids)), np.zeros(len(ids), dtype=np.int64)
    for _ in range(1, num_levels):
        if not len(level):
            break
        likely = below(rows, ids[level])
        scores = (score[level, None] + likely.log_q).ravel()
        new = _best(np.concatenate([score, scores]), shape.nodes)
        new = new[new >= len(score)] - len(score)
        rows = new // likely.ids.shape[1]
        parents = np.concatenate([parents, level[rows]])
        below_ids = np.broadcast_to(likely.ids, (len(level), likely.ids.shape[1])).ravel()
        level = np.arange(len(score), len(score) + len(new))
        ids, score = np.concatenate([ids, below_ids[new]]), np.concatenate([score, scores[new]])
    kept = _best(score, shape.nodes)
    # Where each kept node lies in the result; the entry past the end is the parent -1.
    place = np.full(len(score) + 1, -1)
    place[kept] = np.arange(len(kept))
    return ids[kept], place[parents[kept]]


def _best(score: np.ndarray, count: int) -> np.ndarray:
    """Finds the places of the `count` best, in order of place; of equal ones the first, so parents before children."""
    return np.sort(np.argsort(-score, kind="stable")[:count])
