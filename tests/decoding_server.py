"""A server in this process that decodes with a speculator from disk, and reports its rounds as vLLM does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from fake_server import FakeServer, K

from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.verifier.engine import Engine


@attrs.define(kw_only=True)
class DecodingServer(FakeServer):
    """Answers with what our live decode makes of the request, one request at a time.

    Attributes:
        verifier: its target model.
        speculator: the checkpoint that it drafts with.
    """

    verifier: Engine
    speculator: Path
    details: bool = True

    def decode(self, request: dict[str, Any]) -> Decoded:
        """Decodes one answer."""
        with self.lock:
            drafter = SpeculatorModel.from_pretrained(self.speculator, verifier=self.verifier.folder).draft()
            return decode(
                CachedVerifier(self.verifier.model, drafter.target_layer_ids),
                drafter,
                torch.tensor(request["prompt"]),
                max_new_tokens=request["max_tokens"],
                num_tokens=K,
                stop_ids=frozenset(request["stop_token_ids"]),
            )

    def events(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a streamed answer, a chunk for each round."""
        decoded, done, text = self.decode(request), 0, ""
        for size in (1, *(each.emitted for each in decoded.rounds)):
            ids = list(decoded.tokens[done : done + size])
            done += size
            # A character may be split over two rounds.
            before, text = text, self.verifier.tokenizer.decode(decoded.tokens[:done])
            choice = {"index": 0, "text": text[len(before) :], "token_ids": ids}
            yield {"choices": [choice], "usage": {"completion_tokens": done}}
        accepted = [each.accepted for each in decoded.rounds]
        self.count(done, accepted)
        yield {"choices": [], "usage": {"completion_tokens": done}, **self.report(accepted)}

    def count(self, tokens: int, accepted: Sequence[int]) -> None:
        """Adds an answer to the counters of /metrics."""
        with self.lock:
            self.generated += tokens
            self.rounds += len(accepted)
            for depth in range(K):
                self.by_position[depth] += sum(number > depth for number in accepted)
