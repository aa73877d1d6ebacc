"""Describes prepared conversations in numbers, and renders single ones as text with their mask."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import attrs
import numpy as np

from speculators.data.encoded import Conversations, Encoded
from speculators.data.messages import Conversation
from speculators.data.template import ChatTemplate
from speculators.data.vocab import draft_vocabulary
from speculators.inspection.kinds import kind_spans
from speculators.inspection.view import Bin, RenderedConversation, Rows, TextSpan, Vocabulary

BINS = 10
# At most about this many conversations are left out to estimate coverage of new text: enough for a percent.
LEFT_OUT = 2000


def count_rows(prepared: Conversations) -> Rows:
    """Counts conversations, tokens and rows left out."""
    skipped = prepared.skipped
    return Rows(
        folder=str(prepared.folder),
        read=prepared.conversations + sum(skipped.values()),
        conversations=prepared.conversations,
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
    """Counts the lengths in at most `BINS` ranges of equal width, from the shortest to the longest."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // BINS)
    counts = np.bincount((lengths - shortest) // width)
    starts = range(shortest, longest + 1, width)
    return tuple(
        Bin(start, min(start + width - 1, longest), int(count)) for start, count in zip(starts, counts, strict=True)
    )


def describe_vocabulary(
    prepared: Conversations, ids: np.ndarray, ends: Collection[int], *, template: ChatTemplate, depths: Sequence[int]
) -> Vocabulary:
    """Measures how much of the data a draft vocabulary covers.

    Args:
        ids: [D] target ids of the draft vocabulary.
        ends: tokens that end a turn or a text.
        template: knows the special tokens.
        depths: the K to give the largest possible acceptance length for.
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
        # Each of K drafts is possible with probability c, and the verifier adds a token: tau = 1 + c + ... + c^K.
        most={k: sum(unseen**depth for depth in range(k + 1)) for k in depths},
    )


def unseen_coverage(prepared: Conversations, size: int, ends: Collection[int]) -> float:
    """Estimates which share of the supervised tokens of new, similar text a draft vocabulary of `size` covers.

    A vocabulary chosen by counting looks complete on the text that was counted. So some conversations (a tenth, or
    about `LEFT_OUT` if a tenth is more) are taken out of the counts, and a vocabulary of the rest is tested on them.
    """
    counts = prepared.token_counts()
    step = max(10, -(-len(prepared) // LEFT_OUT))
    left_out = np.zeros_like(counts)
    for index in range(0, len(prepared), step):
        row = prepared.row(index)
        left_out += np.bincount(row.input_ids[row.loss_mask], minlength=len(counts))
    ids = draft_vocabulary(counts - left_out, size, ends)
    return float(left_out[ids].sum() / left_out.sum())


def render_conversation(
    name: str,
    row: Encoded,
    template: ChatTemplate,
    *,
    max_tokens: int,
    conversation: Conversation | None = None,
) -> RenderedConversation:
    """Decodes one row into spans that are supervised or not.

    Args:
        conversation: what the row was made of; its reasoning, calls and results get spans of their own.
    """
    ids, mask = row.input_ids, row.loss_mask
    special = np.isin(ids, template.special_ids)
    # A span ends where the mask changes, and before and after a special token.
    begins = np.ones(len(ids), np.bool_)
    begins[1:] = (mask[1:] != mask[:-1]) | special[1:] | special[:-1]
    starts = np.flatnonzero(begins)
    pieces = [
        TextSpan(template.tokenizer.decode(ids[start:end].tolist()), bool(mask[start]), bool(special[start]))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
    if conversation is not None:
        pieces = list(_by_kind(pieces, kind_spans("".join(piece.text for piece in pieces), conversation)))
    cut = len(ids) >= max_tokens
    return RenderedConversation(id=name, tokens=len(ids), supervised=int(mask.sum()), cut=cut, pieces=tuple(pieces))


def _by_kind(pieces: Sequence[TextSpan], kinds: Sequence[tuple[int, int, str]]) -> Iterator[TextSpan]:
    """Splits spans where a kind begins or ends."""
    at = 0
    for piece in pieces:
        end = at + len(piece.text)
        edges = sorted({at, end, *(edge for start, stop, _ in kinds for edge in (start, stop) if at < edge < end)})
        for first, last in itertools.pairwise(edges):
            kind = next((kind for start, stop, kind in kinds if start <= first < stop), "")
            yield attrs.evolve(piece, text=piece.text[first - at : last - at], kind=kind)
        at = end


def _name(template: ChatTemplate, token: int) -> str:
    return str(template.tokenizer.convert_ids_to_tokens(token))
