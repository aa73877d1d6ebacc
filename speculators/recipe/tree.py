"""The shapes of drafted trees, in the spelling that recipes and the command line share."""

from __future__ import annotations

import itertools
import re
from typing import Any

import attrs

# Upper limits: published trees have about 60 nodes.
MOST_NODES = 512
MOST_LEVELS = 64
FORMS = '"4x2x1" (children of each node, by depth) or "dynamic:16" (the 16 nodes that the draft finds most likely)'


@attrs.frozen
class StaticTree:
    """A tree with the same shape in every round.

    Attributes:
        name: as in `benchmark.trees`.
        paths: the nodes, parents before children. The node (r1, .., rj) is the draft's r1-th most likely first token,
            below it the r2-th most likely second one, and so on; ranks count from 0.
    """

    name: str
    paths: tuple[tuple[int, ...], ...]

    @property
    def nodes(self) -> int:
        """Number of drafted tokens."""
        return len(self.paths)

    @property
    def width(self) -> int:
        """The most drafts that it takes from one place, counted from the most likely."""
        return 1 + max(rank for path in self.paths for rank in path)

    @property
    def levels(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each depth its nodes in order: the parent's index in the level above (0 at the first), and the rank."""
        by_depth: list[dict[tuple[int, ...], tuple[int, int]]] = []
        above: dict[tuple[int, ...], int] = {(): 0}
        for depth in range(1, self.depth_within(MOST_LEVELS) + 1):
            level = {path: (above[path[:-1]], path[-1]) for path in self.paths if len(path) == depth}
            above = {path: index for index, path in enumerate(level)}
            by_depth.append(level)
        return tuple(tuple(level.values()) for level in by_depth)

    def depth_within(self, most: int) -> int:
        """Number of levels, whatever the largest K (`most`) is."""
        return max(map(len, self.paths))


@attrs.frozen
class DynamicTree:
    """The nodes that the draft finds most likely, chosen anew in each round.

    The likelihood of a node is the product of the draft's probabilities on its path, which no child of it exceeds.

    Attributes:
        name: as in `benchmark.trees`.
        nodes: number of drafted tokens.

    Source: EAGLE-2 (2406.16858), which expands only the 10 most likely nodes of a level; DDTree (2604.12989).
    """

    name: str
    nodes: int

    @property
    def width(self) -> int:
        """The most drafts that it takes from one place, counted from the most likely."""
        return self.nodes

    def depth_within(self, most: int) -> int:
        """The most levels: the largest K, or a chain of all nodes."""
        return min(self.nodes, most)


TreeShape = StaticTree | DynamicTree


def parse_tree(text: str) -> TreeShape:
    """Reads a tree's shape.

    Raises:
        ValueError: the text has no such form, or the tree is too large.
    """
    if dynamic := re.fullmatch(r"dynamic:([1-9]\d*)", text):
        nodes = int(dynamic.group(1))
        _check_size(text, nodes, 1)
        return DynamicTree(text, nodes)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f'no tree "{text}"; write {FORMS}')
    widths = [int(part) for part in text.split("x")]
    _check_size(text, sum(itertools.accumulate(widths, lambda above, width: above * width)), len(widths))
    levels = range(1, len(widths) + 1)
    paths = (path for depth in levels for path in itertools.product(*map(range, widths[:depth])))
    return StaticTree(text, tuple(paths))


def known_trees(section: Any, _: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    """attrs validator of `benchmark.trees`: distinct shapes that fit into a response."""
    if len(set(value)) != len(value):
        raise ValueError(f"must be distinct, got {list(value)}")
    for shape in map(parse_tree, value):
        if shape.depth_within(1) > section.max_new_tokens:
            raise ValueError(f'"{shape.name}" is deeper than max_new_tokens = {section.max_new_tokens}')


def _check_size(text: str, nodes: int, levels: int) -> None:
    if nodes > MOST_NODES or levels > MOST_LEVELS:
        most = f"must have at most {MOST_NODES} nodes on {MOST_LEVELS} levels"
        raise ValueError(f'the tree "{text}" {most}, it has {nodes} on {levels}')
