"""The doctor's check of the stored loss mask, on masks made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from speculators.data.encoded import MASK, TOKENS, Conversations
from speculators.doctor.data import check_mask

LENGTH, ROWS = 100, 4


def stored(folder: Path, supervised: int) -> Conversations:
    """Rows of which the last `supervised` tokens are supervised."""
    mask = np.zeros((ROWS, LENGTH), np.uint8)
    mask[:, LENGTH - supervised :] = 1
    (folder / TOKENS).write_bytes(np.zeros((ROWS, LENGTH), np.int32).tobytes())
    (folder / MASK).write_bytes(mask.tobytes())
    lengths = np.full(ROWS, LENGTH)
    return Conversations(folder, lengths, np.full(ROWS, supervised), {}, np.arange(ROWS) * LENGTH)


@pytest.mark.parametrize(
    ("supervised", "plain_text", "result", "words"),
    [
        (40, False, "ok", "160 of 400 tokens"),
        (99, False, "wrong", "all-ones mask"),
        (99, True, "ok", "396 of 400 tokens"),
        (0, True, "wrong", "all-zero mask"),
    ],
)
def test_a_mask_of_ones_is_wrong_unless_the_data_is_plain_text(
    tmp_path: Path, supervised: int, plain_text: bool, result: str, words: str
) -> None:
    """Conversations have prompts, which must not be supervised; plain text has none."""
    check = check_mask(stored(tmp_path, supervised), plain_text=plain_text)
    assert (check.result, words in check.evidence) == (result, True)
