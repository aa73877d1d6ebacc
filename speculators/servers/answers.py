"""Has a running server of the verifier answer prompts: `Engine.generate_batches` over HTTP.

A draft must learn the ids that the verifier wrote. Some servers return only text; then the ids are those of the text,
special tokens included, and a trial answer shows beforehand whether they are as many as the verifier wrote.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import attrs

from speculators.errors import ServerError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.servers.endpoint import COMPLETIONS, Endpoint, in_flight
from speculators.verifier.generate import Sampling
from speculators.verifier.tokens import turn_end

TRIAL_TOKENS = 64
OTHER_SERVER = "use vllm serve, version 0.10.2 or later, which returns ids; or leave out --endpoint"

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
# The text of an answer then holds everything that was written.
WHOLE_TEXT = {"skip_special_tokens": False, "spaces_between_special_tokens": False}


@attrs.frozen(kw_only=True)
class AnswerClient:
    """Answers prompts through an OpenAI-compatible server, several at once.

    Attributes:
        endpoint: of the server.
        model: the name that requests must use.
        tokenizer: the verifier's.
        stop_ids: tokens that end an answer.
        concurrency: requests at once.
        discard: removes the file of hidden states, by its path, that the server writes with each answer; None refuses a
            server that does.
        answered: counts answers; under "text", those whose ids are their text's; under "differing", those of them
            with another number of tokens than the server says.
    """

    endpoint: Endpoint
    model: str
    tokenizer: Any
    stop_ids: tuple[int, ...]
    concurrency: int
    discard: Callable[[str], None] | None = None
    answered: Counter[str] = attrs.field(factory=Counter, init=False)

    def try_answer(self, prompt: Sequence[int]) -> bool:
        """Has one short answer written; returns whether the server gives its ids, rather than text alone.

        Raises:
            ServerError: the ids of its text are not as many as the verifier wrote, or it does not say how many.
        """
        choice, written = self._ask(list(prompt), Sampling(max_new_tokens=TRIAL_TOKENS), seed=0)
        if _has_ids(choice):
            return True
        ids, where = self._tokenized(choice), f"{self.endpoint.url}{COMPLETIONS}"
        if written is None:
            message = f"{where}: returns answers as text only, without the number of their tokens"
            raise ServerError(message, hint=OTHER_SERVER)
        if not _agree(len(ids), written):
            raise ServerError(
                f"{where}: returns answers as text only, and the text of a trial answer has {len(ids)} tokens, where "
                f"the verifier wrote {written}: a draft would learn tokens that the verifier does not write",
                hint=OTHER_SERVER,
            )
        return False

    def generate_batches(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        done: Container[int] = (),
        progress: Progress = ignore,
    ) -> Iterator[tuple[tuple[int, ...], list[list[int]]]]:
        """Continues prompts as `Engine.generate_batches` does; a batch holds whatever finished, in any order.

        Raises:
            ServerError: an answer failed for good; answers finished before are yielded first.
        """
        # Ordered by content, as in process: the seed of a prompt must not depend on its place in the list.
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), tuple(prompts[index])))
        seeds = {index: sampling.seed * 1_000_003 + rank for rank, index in enumerate(order)}
        pending = [index for index in order if index not in done]
        meter = _Meter(len(prompts), len(prompts) - len(pending), progress)

        def answer_prompt(index: int) -> list[int]:
            return self._answer(list(prompts[index]), sampling, seeds[index])

        batch: dict[int, list[int]] = {}
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

    def _answer(self, prompt: list[int], sampling: Sampling, seed: int) -> list[int]:
        choice, written = self._ask(prompt, sampling, seed)
        if _has_ids(choice):
            return [int(token) for token in choice["token_ids"]]
        ids = self._tokenized(choice)
        self.answered["text"] += 1
        self.answered["differing"] += written is None or not _agree(len(ids), written)
        return ids

    def _ask(self, prompt: list[int], sampling: Sampling, seed: int) -> tuple[dict[str, Any], int | None]:
        """Returns the server's answer, and the number of tokens that it says it has."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            # Servers accept signed 32-bit seeds.
            "seed": seed % (1 << 31),
            "stop_token_ids": list(self.stop_ids),
            "return_token_ids": True,
            **WHOLE_TEXT,
            **UNMODIFIED_SAMPLING,
            **sampling.token_filter.on,
        }
        response = self.endpoint.post(COMPLETIONS, body)
        choices = response.get("choices") if isinstance(response, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        where = f"{self.endpoint.url}{COMPLETIONS}"
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise ServerError(
                f"{where}: the response has no choices[0].text", hint="is it an OpenAI-compatible server?"
            )
        if transfer := response.get("kv_transfer_params"):
            if self.discard is None:
                # It would write a file for every answer, which nobody would read and remove.
                raise ServerError(
                    f"{where}: returns hidden states with its answers", hint="use a server started by plain vllm serve"
                )
            self.discard(transfer["hidden_states_path"])
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ServerError(f"{where}: answered a prompt that differs from the one sent")
        usage = response.get("usage")
        written = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        return choice, written if isinstance(written, int) else None

    def _tokenized(self, choice: Mapping[str, Any]) -> list[int]:
        """Tokenizes an answer's text, and appends the token that ended it, which servers leave out of the text."""
        ids: list[int] = self.tokenizer(choice["text"], add_special_tokens=False, verbose=False)["input_ids"]
        if choice.get("finish_reason") != "stop" or (ids and ids[-1] in self.stop_ids):
            return ids
        # vLLM and SGLang name it, unless it is the end of text.
        named = [choice.get(key) for key in ("stop_reason", "matched_stop")]
        end = next((token for token in named if token in self.stop_ids), turn_end(self.tokenizer))
        return ids if end is None else [*ids, end]


def _has_ids(choice: Mapping[str, Any]) -> bool:
    return isinstance(choice.get("token_ids"), list)


def _agree(tokenized: int, written: int) -> bool:
    # Servers differ in whether they count the token that ends an answer.
    return tokenized - written in (0, 1)


class _Meter:
    """Reports how many prompts are answered, and the rate."""

    def __init__(self, total: int, done: int, progress: Progress) -> None:
        self._total, self._done, self._progress = total, done, progress
        self._tokens, self._started = 0, time.monotonic()

    def add(self, answer: Sequence[int]) -> None:
        self._done += 1
        self._tokens += len(answer)
        note = f"{self._tokens / max(time.monotonic() - self._started, 1e-9):,.0f} tokens/s"
        event = ProgressEvent(stage="regenerate", done=self._done, total=self._total, unit="prompts", note=note)
        self._progress(event)
