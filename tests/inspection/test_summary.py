"""Prepared conversations in numbers, and as text with the mask on it."""

from __future__ import annotations

import numpy as np
from data_toys import VOCAB, row, section, some_rows, talk

from speculators.data.prepare import prepare
from speculators.data.template import ChatTemplate
from speculators.data.vocab import draft_vocabulary
from speculators.inspection.summary import (
    count_rows,
    describe_vocabulary,
    histogram,
    render_conversation,
    unseen_coverage,
)


def test_histogram_holds_every_length_once():
    """Ranges of equal width cover the shortest to the longest, and count every length once."""
    for lengths in ([5], [1, 100], [7, 8, 8, 9], list(range(3, 90))):
        bins = histogram(np.array(lengths))
        assert (bins[0].low, bins[-1].high) == (min(lengths), max(lengths))
        assert [part.count for part in bins] == [sum(part.low <= n <= part.high for n in lengths) for part in bins]
        assert sum(part.count for part in bins) == len(lengths)
        assert len(bins) <= 10


def test_numbers_are_those_of_the_prepared_rows(conversations):
    """Tokens, supervised share and quartiles are those of the rows."""
    rows = count_rows(conversations)
    assert (rows.conversations, rows.read, rows.truncated) == (30, 30, 0)
    assert rows.tokens == conversations.lengths.sum()
    assert rows.supervised_share == conversations.supervised.sum() / conversations.lengths.sum()
    lengths = sorted(conversations.lengths.tolist())
    assert (rows.quartiles[0], rows.quartiles[4]) == (lengths[0], lengths[-1])
    assert rows.quartiles[2] in lengths[14:16]


def test_pieces_are_the_text_with_the_mask(tokenizer):
    """Joined, the spans are the rendering; the supervised ones are the answers; special tokens stand alone."""
    template = ChatTemplate.of(tokenizer)
    conversation = talk("hi 🙂", "héllo there", "and?", "bye")
    shown = render_conversation("c", template.encode(conversation, 512)[0], template, max_tokens=512)
    assert "".join(piece.text for piece in shown.pieces) == template.render(conversation.messages)
    assert [piece.text for piece in shown.pieces if piece.supervised] == [
        "héllo there",
        "<|im_end|>",
        "bye",
        "<|im_end|>",
    ]
    assert {piece.text for piece in shown.pieces if piece.special} == {"<|im_start|>", "<|im_end|>"}
    assert not shown.cut
    assert render_conversation("c", template.encode(conversation, 30)[0], template, max_tokens=30).cut


def test_coverage_of_new_text_is_that_of_rows_that_were_not_counted(tokenizer, jsonl, tmp_path):
    """Every tenth row has a letter of its own, so all seen text is covered, but that letter of new text is not."""
    rows = [row(f"q{k}", "a" * 9 + (chr(ord("A") + k // 10) if k % 10 == 0 else "a")) for k in range(100)]
    keys = {"folder": tmp_path / "out", "tokenizer": tokenizer, "vocab_size": VOCAB, "base": tmp_path}
    prepared = prepare(section(jsonl(rows)), **keys)
    counts, ends = prepared.token_counts(), set(prepared.turn_ends)
    size = int((counts > 0).sum())
    ids = draft_vocabulary(counts, size, ends)
    described = describe_vocabulary(prepared, ids, ends, template=ChatTemplate.of(tokenizer), depths=(1, 3))
    assert described.coverage == 1.0
    tokens_a_row = prepared.supervised[0]
    assert described.unseen == unseen_coverage(prepared, size, ends) == 1 - 1 / tokens_a_row
    assert described.most == {1: 1 + described.unseen, 3: sum(described.unseen**k for k in range(4))}
    assert described.ends == {"<|im_end|>": 100}
    assert described.missing == {}


def test_special_tokens_outside_of_the_draft_vocabulary_are_named(tokenizer, jsonl, tmp_path):
    """A supervised special token that is too rare for the vocabulary is named, with its count."""
    rows = [*some_rows(20), row("q", "one <|endoftext|> more")]
    keys = {"folder": tmp_path / "out", "tokenizer": tokenizer, "vocab_size": VOCAB, "base": tmp_path}
    prepared = prepare(section(jsonl(rows)), **keys)
    ids = np.array([2, 50, 60])
    described = describe_vocabulary(prepared, ids, {2}, template=ChatTemplate.of(tokenizer), depths=(1,))
    assert described.missing == {"<|endoftext|>": 1}
