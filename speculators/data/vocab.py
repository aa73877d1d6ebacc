"""Chooses the draft vocabulary: the tokens that a speculator can draft."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from speculators.errors import DataError


def draft_vocabulary(counts: np.ndarray, size: int, must_have: Collection[int] = ()) -> np.ndarray:
    """Chooses the `size` tokens that are supervised most often, among them `must_have` in any case.

    Args:
        counts: [V] int64, how often each token is supervised.
        size: D, at most V.
        must_have: tokens that end a turn, which a speculator must be able to draft.

    Returns:
        [D] int64 target ids, sorted; among equally frequent tokens, those with the smaller ids.

    Raises:
        DataError: D is not in 1..V, or too small for `must_have`.
    """
    forced = np.unique(np.fromiter(must_have, np.int64))
    if not 0 < size <= len(counts):
        raise DataError(
            f"draft_vocab_size is {size}, but the verifier's vocabulary has {len(counts)} tokens",
            hint=f"set algorithm.draft_vocab_size to at most {len(counts)}, or leave it out for the whole vocabulary",
        )
    if len(forced) > size:
        raise DataError(f"draft_vocab_size is {size}, too small for the {len(forced)} tokens that end a turn")
    if np.any((forced < 0) | (forced >= len(counts))):
        raise DataError(f"end-of-turn tokens {forced.tolist()} are not in a vocabulary of {len(counts)} tokens")
    by_count = np.argsort(-counts, kind="stable")  # stable, so that ties keep the order of ids on every machine
    others = by_count[~np.isin(by_count, forced)]
    return np.sort(np.concatenate([forced, others[: size - len(forced)]])).astype(np.int64)


def coverage(ids: np.ndarray, counts: np.ndarray) -> float:
    """Computes the share of the supervised tokens that a draft vocabulary has.

    Args:
        ids: [D] target ids.
        counts: [V] int64, how often each token is supervised.
    """
    return float(counts[ids].sum() / max(counts.sum(), 1))


def rare_tokens(ids: np.ndarray, counts: np.ndarray, must_have: Collection[int]) -> tuple[int, ...]:
    """Lists the tokens of `must_have` that are too rare to be in a draft vocabulary of this size by frequency."""
    by_count = draft_vocabulary(counts, len(ids))
    return tuple(sorted(set(must_have) - set(by_count.tolist())))
