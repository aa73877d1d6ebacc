"""The walk of draft-verify rounds along a known response: its recurrences, forward and backward.

Positions: the response is y_0 .. y_L. The prefill gives y_0, and L tokens are left for the rounds. A round at anchor i
(y_i is the last known token) drafts y_{i+1} .. y_{i+K}; if exactly j drafts are accepted, the next anchor is i + j + 1.
No round begins when nothing is left.

With a[i, j] the probability that depth j is accepted at anchor i, given that the shallower depths were,

    S[i, j] = a[i, 1] * .. * a[i, j]     the first j drafts are all accepted (survive)
    X[i, j] = S[i, j] - S[i, j + 1]      exactly j drafts are accepted (exact); X[i, K] = S[i, K]

Rounds do not start at every anchor equally often: averages over anchors are not averages over rounds, so each anchor
is weighted with the probability of a visit, V[0] = 1, V[i + j + 1] += V[i] * X[i, j].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speculators.bench.counts import Counts


def walk(acceptance: Sequence[np.ndarray], num_tokens: int, lengths: Sequence[np.ndarray] | None = None) -> Counts:
    """Computes expected rounds and acceptance by position of each response.

    Args:
        acceptance: for each response, [L, >= K] in 0..1; entry [i, j - 1] is a[i, j]. Depths past the end of the
            response hold 0.
        num_tokens: K; deeper drafts are not made.
        lengths: for each response, [L] the number of tokens drafted at each anchor, where it may be less than K; the
            tables hold 0 at depths that are not drafted.
    """
    left, survive, exact = _tables(acceptance, num_tokens)
    visited = _visited(left, exact)
    anchors = np.arange(visited.shape[1])
    drafted = np.full(visited.shape, num_tokens)
    for row, length in enumerate(lengths or ()):
        drafted[row, : len(length)] = np.minimum(length, num_tokens)
    depths = np.arange(num_tokens)
    # [n, L, K]: the depth is drafted and there is a token of the response to judge it by.
    exists = (anchors[:, None] + depths < left[:, None, None]) & (depths < drafted[..., None])
    return Counts(
        tokens=left.astype(np.float64),
        rounds=visited.sum(axis=1),
        drafted=(visited * drafted).sum(axis=1),
        # Depth j is reached where the first j - 1 drafts are accepted.
        reached=np.einsum("ni,nij->nj", visited, survive[..., :-1] * exists),
        accepted=np.einsum("ni,nij->nj", visited, survive[..., 1:]),
    )


def walk_places(acceptance: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the expected rounds that begin at each anchor and the expected tokens that they emit, both [n, L].

    Summed over the anchors they are the rounds and the tokens of `walk`.

    Args:
        acceptance: as in `walk`.
        num_tokens: K.
    """
    left, _, exact = _tables(acceptance, num_tokens)
    visited = _visited(left, exact)
    until_end = left[:, None] - np.arange(visited.shape[1])  # [n, L]
    # A round that accepts j drafts emits j + 1 tokens, up to the end of the response.
    emitted = np.minimum(np.arange(1, num_tokens + 2), until_end[..., None])  # [n, L, K + 1]
    return visited, visited * (exact * emitted).sum(axis=-1)


def round_moments(acceptance: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes mean and variance [n] of the number of rounds of each response, given its tokens.

    Backward, with N[i] the rounds from anchor i to the end and N[i] = 1 + N[i + j + 1] with probability X[i, j]:

        E N[i]   = 1 + sum_j X[i, j] * E N[i + j + 1]
        E N[i]^2 = 1 + 2 * sum_j X[i, j] * E N[i + j + 1] + sum_j X[i, j] * E N[i + j + 1]^2

    Args:
        acceptance: as in `walk`.
        num_tokens: K.
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
    # Rounding can leave a variance of zero slightly below it.
    return mean[:, 0], np.maximum(square[:, 0] - mean[:, 0] ** 2, 0.0)


def greedy_rounds(acceptance: np.ndarray, num_tokens: int) -> list[tuple[int, int]]:
    """Lists (anchor, accepted drafts) of each round of the walk at T = 0, where it is deterministic.

    Args:
        acceptance: [L, >= K] of zeros and ones.
        num_tokens: K.
    """
    rounds = []
    anchor = 0
    while anchor < len(acceptance):
        accepted = int(acceptance[anchor, :num_tokens].cumprod().sum())
        rounds.append((anchor, accepted))
        anchor += accepted + 1
    return rounds


def _visited(left: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Computes V, [n, L]: the probability that a round begins at each anchor; 0 past the end of a response."""
    rows, longest, outcomes = exact.shape
    # [n, L + K + 1]: a round may step past the end of the longest response.
    visits = np.zeros((rows, longest + outcomes))
    visits[:, 0] = 1.0
    for i in range(longest):
        # exact[:, i] is [n, K + 1]: j = 0 .. K accepted drafts lead to anchors i + 1 .. i + K + 1.
        visits[:, i + 1 : i + 1 + outcomes] += np.where(i < left, visits[:, i], 0.0)[:, None] * exact[:, i]
    return np.where(np.arange(longest) < left[:, None], visits[:, :longest], 0.0)


def _tables(acceptance: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pads the responses to one length: left [n] is L of each, survive [n, L, K + 1] is S, exact [n, L, K + 1] is X."""
    left = np.array([len(table) for table in acceptance], dtype=np.int64)
    padded = np.zeros((len(acceptance), int(left.max(initial=0)), num_tokens))
    for row, table in enumerate(acceptance):
        padded[row, : len(table)] = table[:, :num_tokens]
    survive = np.concatenate([np.ones_like(padded[..., :1]), padded.cumprod(axis=-1)], axis=-1)
    exact = survive.copy()
    exact[..., :-1] -= survive[..., 1:]
    return left, survive, exact
