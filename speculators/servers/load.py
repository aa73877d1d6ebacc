"""Sends a suite's prompts to a running server, several at a time, and measures how fast the answers come."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from speculators.bench.suites import Prompt
from speculators.data.messages import Message
from speculators.data.replies import AnswerReader
from speculators.data.template import ChatTemplate
from speculators.events import Progress, ProgressEvent, ignore
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.servers.answers import UNMODIFIED_SAMPLING, WHOLE_TEXT
from speculators.servers.endpoint import Endpoint, in_flight
from speculators.servers.streaming import Completion, complete

WARM_UP_TOKENS = 8


@attrs.frozen(kw_only=True)
class Workload:
    """Prompts, and how a server has to answer them.

    Attributes:
        suite: its name.
        suite_digest: of all prompts of the suite.
        prompts: those of the suite that are sent.
        template: of the verifier. Prompts are sent as token ids, so the server's own template plays no part.
        max_new_tokens: of one answer.
        stop_ids: tokens that end an answer.
        seed: of the sampling; each answer gets its own, counted from here.
        concurrency: prompts under way at once. The turns of one prompt follow each other.
        temperature: 0 is greedy.
        token_filter: tokens that the server samples from.
    """

    suite: str
    suite_digest: str
    prompts: Sequence[Prompt]
    template: ChatTemplate
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    concurrency: int
    temperature: float = 0.0
    token_filter: TokenFilter = ALL_TOKENS

    @functools.cached_property
    def reader(self) -> AnswerReader:
        """Makes messages of answers, for the turns after them."""
        return AnswerReader.of(self.template)

    def request(self, model: str, number: int) -> dict[str, Any]:
        """Builds the fields of the request for answer `number`, without the prompt."""
        return {
            "model": model,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed + number,
            "stop_token_ids": list(self.stop_ids),
            **UNMODIFIED_SAMPLING,
            **self.token_filter.on,
            **WHOLE_TEXT,
        }


@attrs.frozen(kw_only=True)
class Spread:
    """Mean, median and 95th percentile, in seconds."""

    mean: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float], weights: Sequence[float] | None = None) -> Spread | None:
        """Summarises values, each counted `weights` times; None if there are no values."""
        if not len(values):
            return None
        seconds = np.asarray(values, dtype=np.float64)
        counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
        order = np.argsort(seconds)
        share = counts[order].cumsum() / counts.sum()
        # The tolerance keeps a level that coincides with a step from moving to the next value by rounding.
        p50, p95 = (float(seconds[order][int((share < level - 1e-9).sum())]) for level in (0.5, 0.95))
        return cls(mean=float(np.average(seconds, weights=counts)), p50=p50, p95=p95)


@attrs.frozen(kw_only=True)
class ServingSpeed:
    """How fast a server answered.

    Attributes:
        requests: answers.
        tokens: of all answers.
        seconds: wall clock from the first request to the end of the last answer.
        tokens_per_second: tokens / seconds, over all requests under way at once.
        first_token: from sending a request to its first token.
        inter_token: between tokens. The time before a chunk is divided evenly among its tokens. Like `first_token`,
            None if the server reports the number of tokens only at the end.
        repeated: requests that had to be sent again.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token: Spread | None
    inter_token: Spread | None
    repeated: int


def run_workload(
    endpoint: Endpoint, workload: Workload, *, model: str, progress: Progress = ignore
) -> tuple[dict[str, list[Completion]], float]:
    """Has a server answer all prompts; returns the answers to each prompt's turns by its id, and the seconds taken.

    Raises:
        ServerError: a request failed for good; no further one is sent.
    """
    # A stop event of its own: a failure here must not end later work on the same endpoint.
    endpoint = attrs.evolve(endpoint, stop=threading.Event())
    started = time.perf_counter()
    # Numbers answers by prompt and turn, so that each has its own seed whatever the order of completion.
    turns = max((1 + len(prompt.later) for prompt in workload.prompts), default=1)

    def converse(item: tuple[int, Prompt]) -> list[Completion]:
        return _converse(endpoint, workload, model, item[1], item[0] * turns)

    answers: dict[str, list[Completion]] = {}
    items = enumerate(workload.prompts)
    for (_, prompt), completions in in_flight(converse, items, concurrency=workload.concurrency, stop=endpoint.stop):
        answers[prompt.id] = completions
        done, total = len(answers), len(workload.prompts)
        progress(ProgressEvent(stage="serve", done=done, total=total, unit="prompts", note=endpoint.url))
    return {prompt.id: answers[prompt.id] for prompt in workload.prompts}, time.perf_counter() - started


def warm_up(endpoint: Endpoint, workload: Workload, *, model: str) -> Completion:
    """Generates a few tokens before the measurement, and returns them.

    The prompt is one of the suite's in reverse, so that it shares no prefix with the suite's prompts: the server's
    prefix cache must not answer any of them.
    """
    ids = list(reversed(workload.prompts[0].ids(workload.template)))
    request = workload.request(model, 0)
    return complete(endpoint, ids, {**request, "max_tokens": min(WARM_UP_TOKENS, workload.max_new_tokens)})


def measure_speed(answers: Sequence[Completion], seconds: float) -> ServingSpeed:
    """Computes throughput and latencies of answers that together took `seconds`."""
    tokens = sum(answer.tokens for answer in answers)
    timed = bool(answers) and all(answer.arrivals for answer in answers if answer.tokens)
    gaps: list[float] = []
    weights: list[float] = []
    for answer in answers if timed else ():
        for (before, count), (now, total) in zip(answer.arrivals, answer.arrivals[1:], strict=False):
            gaps.append((now - before) / (total - count))
            weights.append(total - count)
    return ServingSpeed(
        requests=len(answers),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token=Spread.of([answer.arrivals[0][0] for answer in answers if answer.arrivals]) if timed else None,
        inter_token=Spread.of(gaps, weights),
        repeated=sum(answer.tries > 1 for answer in answers),
    )


def _converse(endpoint: Endpoint, workload: Workload, model: str, prompt: Prompt, number: int) -> list[Completion]:
    """Asks a prompt's turns one after another; later turns see the server's own earlier answers."""
    messages, ids = prompt.messages, list[int]()
    answers: list[Completion] = []
    for turn in range(1 + len(prompt.later)):
        if turn:
            reply = workload.reader.message(answers[-1].text, prompt=workload.template.tokenizer.decode(ids))
            messages = (*messages, reply, Message("user", prompt.later[turn - 1]))
        ids = prompt.ids(workload.template, messages)
        answers.append(complete(endpoint, ids, workload.request(model, number + turn)))
    return answers
