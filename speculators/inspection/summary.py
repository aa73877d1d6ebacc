"""Prepared conversations in numbers, and single ones as text with the mask on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from speculators.data.encoded import Conversations, Encoded
from speculators.data.template import ChatTemplate
from speculators.data.vocab import draft_vocabulary
from speculators.inspection.view import Bin, Piece, Rows, Shown, Vocabulary

BINS = 10
# Conversations that are read to tell what the draft vocabulary covers of unseen text: enough for a percent.
LEFT_OUT = 2000


def count_rows(prepared: Conversations) -> Rows:
    """Returns the numbers of prepared conversations."""
    skipped = prepared.skipped
    return Rows(
        folder=str(prepared.folder),
        read=len(prepared) + sum(skipped.values()),
        conversations=len(prepared),
        tokens=int(prepared.lengths.sum()),
        supervised=int(prepared.supervised.sum()),
        max_tokens=prepared.manifest["max_tokens"],
        truncated=prepared.truncated,
        skipped=skipped,
        quartiles=tuple(
            int(length) for length in np.quantile(prepared.lengths, np.linspace(0, 1, 5), method="nearest")
        ),
        histogram=histogram(prepared.lengths),
    )


def histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """Returns how many of the lengths are in each of at most `BINS` equal ranges from the shortest to the longest."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // BINS)
    counts = np.bincount((lengths - shortest) // width)
    starts = range(shortest, longest + 1, width)
    return tuple(
        Bin(start, min(start + width - 1, longest), int(count)) for start, count in zip(starts, counts, strict=True)
    )


def describe(
    prepared: Conversations, ids: np.ndarray, ends: Collection[int], *, template: ChatTemplate, depths: Sequence[int]
) -> Vocabulary:
    """Returns what a draft vocabulary covers.

    Args:
        prepared: the conversations.
        ids: [D] target ids.
        ends: tokens that end a turn or a text.
        template: knows the special tokens.
        depths: the K to tell the largest acceptance length for.
    """
    counts = prepared.token_counts()
    unseen = unseen_coverage(prepared, len(ids), ends)
    special = [int(token) for token in template.special_ids if token < len(counts)]
    missing = [token for token in special if counts[token] and token not in set(ids.tolist())]
    return Vocabulary(
        size=len(ids),
        of=len(counts),
        coverage=float(counts[ids].sum() / counts.sum()),
        unseen=unseen,
        ends={_name(template, token): int(counts[token]) for token in sorted(ends)},
        missing={_name(template, token): int(counts[token]) for token in missing},
        # K drafts of which each is possible with probability c, and the verifier's own token: 1 + c + ... + c^K.
        most={k: sum(unseen**depth for depth in range(k + 1)) for k in depths},
    )


def unseen_coverage(prepared: Conversations, size: int, ends: Collection[int]) -> float:
    """Returns the share of supervised tokens of text like this that a draft vocabulary of `size` would have.

    A vocabulary chosen by counting looks complete on what was counted. So some conversations (a tenth, if these are
    not too many to read) are taken out of the counts, and the vocabulary of the rest is held against them.
    """
    counts = prepared.token_counts()
    step = max(10, -(-len(prepared) // LEFT_OUT))
    left_out = np.zeros_like(counts)
    for index in range(0, len(prepared), step):
        row = prepared.row(index)
        left_out += np.bincount(row.input_ids[row.loss_mask], minlength=len(counts))
    ids = draft_vocabulary(counts - left_out, size, ends)
    return float(left_out[ids].sum() / left_out.sum())


def show(name: str, row: Encoded, template: ChatTemplate, *, max_tokens: int) -> Shown:
    """Returns one conversation in pieces."""
    ids, mask = row.input_ids, row.loss_mask
    special = np.isin(ids, template.special_ids)
    # A piece ends where the mask changes, and before and after a special token.
    new = np.ones(len(ids), np.bool_)
    new[1:] = (mask[1:] != mask[:-1]) | special[1:] | special[:-1]
    starts = np.flatnonzero(new)
    pieces = [
        Piece(template.tokenizer.decode(ids[start:end].tolist()), bool(mask[start]), bool(special[start]))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
    cut = len(ids) >= max_tokens
    return Shown(id=name, tokens=len(ids), supervised=int(mask.sum()), cut=cut, pieces=tuple(pieces))


def _name(template: ChatTemplate, token: int) -> str:
    return str(template.tokenizer.convert_ids_to_tokens(token))
