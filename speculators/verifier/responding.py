"""The verifier as a benchmark by replay needs it, wherever it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from speculators.events import Progress
from speculators.facts import VerifierFacts
from speculators.recipe.token_filter import TokenFilter


class RespondingVerifier(Protocol):
    """Answers prompts and gives states: `Engine` in this process, or a server."""

    @property
    def folder(self) -> Path:
        """The verifier's folder, from which its head is read."""

    @property
    def facts(self) -> VerifierFacts:
        """Its config.json."""

    @property
    def device(self) -> torch.device:
        """Where states are put."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""

    @property
    def tokenizer(self) -> Any:
        """The verifier's tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        token_filter: TokenFilter,
        seed: int,
        progress: Progress,
    ) -> list[list[int]]:
        """Continues prompts, as `Engine.generate` does."""

    def capture_all(
        self, rows: Sequence[torch.Tensor], layer_ids: Sequence[int], *, longest: Sequence[int] | None
    ) -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields the index of each sequence with its states, as `Engine.capture_all` does."""
