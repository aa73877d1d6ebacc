"""The verifier of the server that computes the states: it answers a recipe's suites, so that no process loads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.events import Progress
from speculators.facts import VerifierFacts
from speculators.pipeline.context import Context
from speculators.pipeline.server_states import states_pool
from speculators.recipe.token_filter import TokenFilter
from speculators.servers.answers import AnswerClient
from speculators.servers.states_pool import StatesPool
from speculators.verifier.generate import Sampling
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer


@attrs.frozen(eq=False, kw_only=True)
class ServedVerifier:
    """Answers and gives states like `Engine`, through servers; the first of them answers.

    Attributes:
        folder: of the verifier, from which its head is read.
        facts: its config.json.
        device: where states are put.
        dtype: in which the server computes.
        answers: requests answers.
        states: requests states.
    """

    folder: Path
    facts: VerifierFacts
    device: torch.device
    dtype: torch.dtype
    answers: AnswerClient
    states: StatesPool

    @classmethod
    def of(cls, context: Context) -> ServedVerifier:
        """Connects to the recipe's servers; raises as `states_pool` does."""
        section = context.recipe.verifier
        pool, served = states_pool(context)
        first = pool.clients[0]
        answers = AnswerClient(
            endpoint=first.endpoint,
            model=served.model,
            tokenizer=load_tokenizer(context.folder, section),
            stop_ids=folder_stop_ids(context.folder, section),
            concurrency=context.recipe.data.server.concurrency,
            discard=first.discard,
        )
        return cls(
            folder=context.folder,
            facts=context.plan.facts,
            device=context.world.device,
            dtype=first.dtype,
            answers=answers,
            states=pool,
        )

    @property
    def tokenizer(self) -> Any:
        """The verifier's tokenizer."""
        return self.answers.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.answers.stop_ids

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
        """Continues prompts, as `Engine.generate` does; raises ServerError if an answer fails for good."""
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, token_filter=token_filter, seed=seed
        )
        outputs = [
            pair
            for batch in self.answers.generate_batches(prompts, sampling, progress=progress)
            for pair in zip(*batch, strict=True)
        ]
        return [output for _, output in sorted(outputs)]

    def capture_all(
        self, rows: Sequence[torch.Tensor], layer_ids: Sequence[int], *, longest: Sequence[int] | None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Captures many sequences, as `Engine.capture_all` does; raises ServerError if one fails for good.

        Args:
            rows: sequences of token ids, each [n] int64.
            layer_ids: those of the recipe, which the server was started with.
            longest: not sent, because a server chooses longrope's factors by itself.
        """
        assert tuple(layer_ids) == self.states.clients[0].layer_ids, "a server gives the states that it was started for"
        for index, chosen, last in self.states.capture_all(enumerate(rows), concurrency=self.answers.concurrency):
            yield index, chosen.to(self.device), last.to(self.device)
