"""The verifier's own continuations from a running server: `Engine.generate_batches` over HTTP."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import attrs

from speculators.errors import ServerError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.servers.endpoint import Endpoint, in_flight
from speculators.servers.states import COMPLETIONS
from speculators.verifier.generate import Sampling

# New tokens, or their text where the server tells no ids.
Answer = list[int] | str

# A server takes what it is not told from the model's generation_config.json: a cut distribution or a penalty there
# would make other answers than the verifier's own.
PURE = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@attrs.frozen(kw_only=True)
class ServedAnswers:
    """Answers prompts through an OpenAI-compatible server, several at once.

    Attributes:
        endpoint: of the server.
        model: the name that requests must use.
        tokenizer: of the verifier.
        stop_ids: tokens that end an answer.
        concurrency: requests at once.
    """

    endpoint: Endpoint
    model: str
    tokenizer: Any
    stop_ids: tuple[int, ...]
    concurrency: int

    def generate_batches(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        done: Container[int] = (),
        progress: Progress = ignore,
    ) -> Iterator[tuple[tuple[int, ...], list[Answer]]]:
        """Continues prompts; see `Engine.generate_batches`. Batches are what is finished, in any order.

        Raises:
            ServerError: an answer cannot be had; those that came before it are yielded first.
        """
        # By content, not by place, as the engine does: what is sampled does not depend on the order given.
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), tuple(prompts[index])))
        seeds = {index: sampling.seed * 1_000_003 + rank for rank, index in enumerate(order)}
        wanted = [index for index in order if index not in done]
        meter = _Meter(len(prompts), len(prompts) - len(wanted), progress)

        def ask(index: int) -> Answer:
            return self._answer(list(prompts[index]), sampling, seeds[index])

        kept: dict[int, Answer] = {}
        failure: ServerError | None = None
        try:
            for index, answer in in_flight(ask, wanted, concurrency=self.concurrency, stop=self.endpoint.stop):
                kept[index] = answer
                meter.add(answer)
                if len(kept) == sampling.batch_size:
                    yield tuple(kept), list(kept.values())
                    kept = {}
        except ServerError as error:
            failure = error
        if kept:
            yield tuple(kept), list(kept.values())
        if failure is not None:
            raise failure

    def _answer(self, prompt: list[int], sampling: Sampling, seed: int) -> Answer:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            # 32 bits signed is what servers take.
            "seed": seed % (1 << 31),
            "stop_token_ids": list(self.stop_ids),
            "return_token_ids": True,
            **PURE,
        }
        told = self.endpoint.post(COMPLETIONS, body)
        choices = told.get("choices") if isinstance(told, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        where = f"{self.endpoint.url}{COMPLETIONS}"
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise ServerError(f"{where}: the answer has no choices[0].text", hint="is it an OpenAI-compatible server?")
        if told.get("kv_transfer_params"):
            # It would write a file for every answer, and nobody would read and remove it.
            raise ServerError(f"{where}: gives hidden states with its answers", hint="ask one of plain vllm serve")
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ServerError(f"{where}: answered another prompt than the one that was sent")
        ids = choice.get("token_ids")
        return [int(token) for token in ids] if isinstance(ids, list) else choice["text"]


class _Meter:
    """Tells how many prompts are answered, and how fast."""

    def __init__(self, total: int, done: int, progress: Progress) -> None:
        self._total, self._done, self._progress = total, done, progress
        self._made, self._started = 0, time.monotonic()
        self._unit = "tokens"

    def add(self, answer: Answer) -> None:
        self._done += 1
        self._made += len(answer)
        if isinstance(answer, str):
            self._unit = "characters"
        note = f"{self._made / max(time.monotonic() - self._started, 1e-9):,.0f} {self._unit}/s"
        event = ProgressEvent(stage="regenerate", done=self._done, total=self._total, unit="prompts", note=note)
        self._progress(event)
