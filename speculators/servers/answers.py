"""Has a running server of the verifier answer prompts: `Engine.generate_batches` over HTTP."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import attrs

from speculators.errors import ServerError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.servers.endpoint import COMPLETIONS, Endpoint, in_flight
from speculators.verifier.generate import Sampling

# New token ids, or their text if the server returns no ids.
Answer = list[int] | str

# Servers take defaults from the model's generation_config.json. A truncated distribution or a penalty from there would
# give other answers than the verifier's own distribution, so every such field is sent with its neutral value.
UNMODIFIED_SAMPLING = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@attrs.frozen(kw_only=True)
class AnswerClient:
    """Answers prompts through an OpenAI-compatible server, several at once.

    Attributes:
        endpoint: of the server.
        model: the name that requests must use.
        tokenizer: the verifier's.
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
        """Continues prompts as `Engine.generate_batches` does; a batch holds whatever finished, in any order.

        Raises:
            ServerError: an answer failed for good; answers finished before are yielded first.
        """
        # Ordered by content, as in process: the seed of a prompt must not depend on its place in the list.
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), tuple(prompts[index])))
        seeds = {index: sampling.seed * 1_000_003 + rank for rank, index in enumerate(order)}
        pending = [index for index in order if index not in done]
        meter = _Meter(len(prompts), len(prompts) - len(pending), progress)

        def answer_prompt(index: int) -> Answer:
            return self._answer(list(prompts[index]), sampling, seeds[index])

        batch: dict[int, Answer] = {}
        failure: ServerError | None = None
        try:
            for index, answer in in_flight(
                answer_prompt, pending, concurrency=self.concurrency, stop=self.endpoint.stop
            ):
                batch[index] = answer
                meter.add(answer)
                if len(batch) == sampling.batch_size:
                    yield tuple(batch), list(batch.values())
                    batch = {}
        except ServerError as error:
            failure = error
        if batch:
            yield tuple(batch), list(batch.values())
        if failure is not None:
            raise failure

    def _answer(self, prompt: list[int], sampling: Sampling, seed: int) -> Answer:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            # Servers accept signed 32-bit seeds.
            "seed": seed % (1 << 31),
            "stop_token_ids": list(self.stop_ids),
            "return_token_ids": True,
            **UNMODIFIED_SAMPLING,
        }
        response = self.endpoint.post(COMPLETIONS, body)
        choices = response.get("choices") if isinstance(response, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        where = f"{self.endpoint.url}{COMPLETIONS}"
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise ServerError(
                f"{where}: the response has no choices[0].text", hint="is it an OpenAI-compatible server?"
            )
        if response.get("kv_transfer_params"):
            # It would write a file for every answer, which nobody would read and remove.
            raise ServerError(
                f"{where}: returns hidden states with its answers", hint="use a server started by plain vllm serve"
            )
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ServerError(f"{where}: answered a prompt that differs from the one sent")
        ids = choice.get("token_ids")
        return [int(token) for token in ids] if isinstance(ids, list) else choice["text"]


class _Meter:
    """Reports how many prompts are answered, and the rate."""

    def __init__(self, total: int, done: int, progress: Progress) -> None:
        self._total, self._done, self._progress = total, done, progress
        self._size, self._started = 0, time.monotonic()
        self._unit = "tokens"

    def add(self, answer: Answer) -> None:
        self._done += 1
        self._size += len(answer)
        if isinstance(answer, str):
            self._unit = "characters"
        note = f"{self._size / max(time.monotonic() - self._started, 1e-9):,.0f} {self._unit}/s"
        event = ProgressEvent(stage="regenerate", done=self._done, total=self._total, unit="prompts", note=note)
        self._progress(event)
