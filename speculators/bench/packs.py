"""Packs responses into rows for replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch

from speculators.bench.rows import JudgedResponse


def packs(rows: Sequence[JudgedResponse], row_tokens: int) -> Iterator[list[JudgedResponse]]:
    """Groups responses in order, so that each group has up to `row_tokens` tokens, or is one response."""
    pack: list[JudgedResponse] = []
    size = 0
    for row in rows:
        length = len(row.response.tokens)
        if pack and size + length > row_tokens:
            yield pack
            pack, size = [], 0
        pack.append(row)
        size += length
    if pack:
        yield pack


@attrs.frozen(eq=False)
class Pack:
    """Responses packed into one row of S tokens. Places are indices in it.

    Attributes:
        tokens: [S] of all responses, prompts included.
        log_p: [S] log-probability that the verifier gives each response token; 0 elsewhere and at T = 0.
        lengths: [n] tokens of each response.
        anchors: for each response, the places of the states that its rounds draft from.
        end: [n] the place after the last token of each response.
    """

    rows: Sequence[JudgedResponse]
    tokens: torch.Tensor
    log_p: torch.Tensor
    lengths: torch.Tensor
    anchors: tuple[torch.Tensor, ...]
    end: torch.Tensor

    @property
    def rounds(self) -> list[int]:
        """Number of anchors of each response."""
        return [len(places) for places in self.anchors]

    @classmethod
    def of(cls, rows: Sequence[JudgedResponse]) -> Pack:
        """Packs `rows` in order."""
        lengths = torch.tensor([len(row.response.tokens) for row in rows])
        end = lengths.cumsum(0)
        tokens = torch.tensor([token for row in rows for token in row.response.tokens], dtype=torch.int64)
        log_p = torch.zeros(len(tokens))
        anchors = []
        for row, stop in zip(rows, end.tolist(), strict=True):
            if row.log_p is not None:
                log_p[stop - len(row.log_p) : stop] = row.log_p.cpu()
            # The last known token of a round at anchor i is y_i, at place p. Its draft starts from the state at p - 1:
            # when a round begins, the verifier has computed no state at the token it has just emitted.
            rounds = max(0, len(row.response.answer) - 1)
            anchors.append(torch.arange(stop - 2 - rounds, stop - 2))
        return cls(rows, tokens, log_p, lengths, tuple(anchors), end)

    def batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Makes the tensors that `Replays.replay` takes, [1, S, A*H] and [1, S]."""
        positions = torch.cat([torch.arange(int(length)) for length in self.lengths])
        # Documents never attend to each other, so a packed response sees what it would see alone.
        documents = torch.repeat_interleave(torch.arange(len(self.rows)), self.lengths)
        return {
            "hidden_states": torch.cat([row.hidden_states for row in self.rows]).to(device)[None],
            "input_ids": self.tokens.to(device)[None],
            "position_ids": positions.to(device)[None],
            "document_ids": documents.to(device)[None],
        }
