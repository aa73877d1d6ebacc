"""The walk of draft-verify rounds along a known response: its recurrences, forward and backward.

Positions: the response is y_0 .. y_L, where y_0 comes from the prefill and L tokens are left for the rounds. A round at
anchor i (y_i is the last known token) drafts y_{i+1} .. y_{i+K}; if exactly j drafts are accepted the next anchor is
i + j + 1. A round that begins when nothing is left does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speculators.bench.counts import Counts


def walk(acceptance: Sequence[np.ndarray], num_tokens: int, lengths: Sequence[np.ndarray] | None = None) -> Counts:
    """Returns expected rounds and acceptance by position, each anchor weighted by the probability of a visit.

    Args:
        acceptance: a response each, [L, >= K] in 0..1: entry [i, j - 1] is the probability that the draft at depth j of
            anchor i is accepted, given that the shallower ones were. Depths past the end of the response hold 0.
        num_tokens: K; drafts deeper than this are not made.
        lengths: a response each, [L] how many tokens its anchors draft, where that may be fewer than K; the tables hold
            0 at the depths that are not drafted.
    """
    left, survive, exact = _tables(acceptance, num_tokens)
    longest = exact.shape[1]
    visits = np.zeros((len(acceptance), longest + num_tokens + 1))
    visits[:, 0] = 1.0
    anchors = np.arange(longest)
    for i in anchors:
        visits[:, i + 1 : i + num_tokens + 2] += np.where(i < left, visits[:, i], 0.0)[:, None] * exact[:, i]
    visited = np.where(anchors < left[:, None], visits[:, :longest], 0.0)
    drafted = np.full((len(acceptance), longest), num_tokens)
    for row, length in enumerate(lengths or ()):
        drafted[row, : len(length)] = np.minimum(length, num_tokens)
    depths = np.arange(num_tokens)
    exists = (anchors[:, None] + depths < left[:, None, None]) & (depths < drafted[..., None])
    return Counts(
        tokens=left.astype(np.float64),
        rounds=visited.sum(axis=1),
        drafted=(visited * drafted).sum(axis=1),
        reached=np.einsum("ni,nij->nj", visited, survive[..., :-1] * exists),
        accepted=np.einsum("ni,nij->nj", visited, survive[..., 1:]),
    )


def round_moments(acceptance: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and variance [n] of each response's number of rounds, given its tokens.

    E[i] = 1 + sum_j P(exactly j accepted at i) E[i + j + 1], from the end; the second moment in the same way.

    Args:
        acceptance: as in `walk`.
    """
    left, _, exact = _tables(acceptance, num_tokens)
    longest = exact.shape[1]
    mean = np.zeros((len(acceptance), longest + num_tokens + 1))
    square = np.zeros_like(mean)
    for i in reversed(range(longest)):
        after = slice(i + 1, i + num_tokens + 2)
        rest = (exact[:, i] * mean[:, after]).sum(axis=1)
        rest_square = (exact[:, i] * square[:, after]).sum(axis=1)
        mean[:, i] = np.where(i < left, 1.0 + rest, 0.0)
        square[:, i] = np.where(i < left, 1.0 + 2.0 * rest + rest_square, 0.0)
    return mean[:, 0], np.maximum(square[:, 0] - mean[:, 0] ** 2, 0.0)


def greedy_rounds(acceptance: np.ndarray, num_tokens: int) -> list[tuple[int, int]]:
    """Returns (anchor, accepted drafts) of each round of the walk at T = 0, where it is deterministic.

    Args:
        acceptance: [L, >= K] of zeros and ones.
    """
    rounds = []
    anchor = 0
    while anchor < len(acceptance):
        accepted = int(acceptance[anchor, :num_tokens].cumprod().sum())
        rounds.append((anchor, accepted))
        anchor += accepted + 1
    return rounds


def _tables(acceptance: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns left [n], survive [n, L, K + 1] (all of the first j accepted), exact [n, L, K + 1] (exactly j)."""
    left = np.array([len(table) for table in acceptance], dtype=np.int64)
    padded = np.zeros((len(acceptance), int(left.max(initial=0)), num_tokens))
    for row, table in enumerate(acceptance):
        padded[row, : len(table)] = table[:, :num_tokens]
    survive = np.concatenate([np.ones_like(padded[..., :1]), padded.cumprod(axis=-1)], axis=-1)
    exact = survive.copy()
    exact[..., :-1] -= survive[..., 1:]
    return left, survive, exact
