"""A suite's prompts put to a running server, several at a time; what came back, and how fast."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from speculators.bench.suites import Prompt
from speculators.data.conversations import Message
from speculators.data.template import ChatTemplate
from speculators.events import Progress, ProgressEvent, ignore
from speculators.servers.answers import PURE
from speculators.servers.endpoint import Endpoint, in_flight
from speculators.servers.streaming import Answer, complete

WARM_UP_TOKENS = 8


@attrs.frozen(kw_only=True)
class Asking:
    """How prompts are put.

    Attributes:
        model: as the server calls it.
        stop_ids: tokens that end an answer.
        seed: of sampling; each answer has its own.
        concurrency: prompts that are under way at once; the turns of one follow each other.
    """

    model: str
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    seed: int
    concurrency: int

    def request(self, number: int) -> dict[str, Any]:
        """Returns the fields of the request for the answer of that number."""
        return {
            "model": self.model,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed + number,
            "stop_token_ids": list(self.stop_ids),
            **PURE,
        }


@attrs.frozen(kw_only=True)
class Spread:
    """Seconds: their mean, median and 95th percentile."""

    mean: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float], weights: Sequence[float] | None = None) -> Spread | None:
        """Returns the spread of values, each of which counts `weights` times; None without values."""
        if not len(values):
            return None
        seconds = np.asarray(values, dtype=np.float64)
        counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
        order = np.argsort(seconds)
        share = counts[order].cumsum() / counts.sum()
        # Where the level falls on a step, rounding of the sum must not lead to the next value.
        p50, p95 = (float(seconds[order][int((share < level - 1e-9).sum())]) for level in (0.5, 0.95))
        return cls(mean=float(np.average(seconds, weights=counts)), p50=p50, p95=p95)


@attrs.frozen(kw_only=True)
class Pace:
    """How fast a server answered.

    Attributes:
        requests: answers.
        tokens: of all answers.
        seconds: wall clock from the first request to the end of the last answer.
        tokens_per_second: tokens / seconds, all requests that were under way at once together.
        first_token: from sending a request to its first token.
        inter_token: between tokens: the time before a piece of an answer is shared by the tokens that it brought. None,
            like `first_token`, where the server tells the number of tokens only at the end.
        repeated: requests that had to be sent again.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token: Spread | None
    inter_token: Spread | None
    repeated: int


def ask(
    endpoint: Endpoint,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    asking: Asking,
    *,
    progress: Progress = ignore,
) -> tuple[dict[str, list[Answer]], float]:
    """Returns the answers to each prompt's turns by its id, and the seconds that all took.

    Raises:
        ServerError: a request failed for good; no further one is sent.
    """
    # Its end is that of these requests alone.
    endpoint = attrs.evolve(endpoint, stop=threading.Event())
    began = time.perf_counter()
    turns = max((1 + len(prompt.later) for prompt in prompts), default=1)

    def converse(item: tuple[int, Prompt]) -> list[Answer]:
        return _converse(endpoint, template, item[1], asking, item[0] * turns)

    answers: dict[str, list[Answer]] = {}
    for (_, prompt), told in in_flight(
        converse, enumerate(prompts), concurrency=asking.concurrency, stop=endpoint.stop
    ):
        answers[prompt.id] = told
        done = ProgressEvent(stage="serve", done=len(answers), total=len(prompts), unit="prompts", note=endpoint.url)
        progress(done)
    return {prompt.id: answers[prompt.id] for prompt in prompts}, time.perf_counter() - began


def warm_up(endpoint: Endpoint, template: ChatTemplate, prompt: Prompt, asking: Asking) -> None:
    """Has a few tokens made that are not counted, of a prompt that shares no beginning with the suite's."""
    ids = list(reversed(template.prompt_ids(prompt.messages)))
    complete(endpoint, ids, {**asking.request(0), "max_tokens": min(WARM_UP_TOKENS, asking.max_new_tokens)})


def pace(answers: Sequence[Answer], seconds: float) -> Pace:
    """Returns how fast answers came that together took `seconds`."""
    tokens = sum(answer.tokens for answer in answers)
    timed = bool(answers) and all(answer.arrivals for answer in answers if answer.tokens)
    gaps: list[float] = []
    weights: list[float] = []
    for answer in answers if timed else ():
        for (before, known), (now, total) in zip(answer.arrivals, answer.arrivals[1:], strict=False):
            gaps.append((now - before) / (total - known))
            weights.append(total - known)
    return Pace(
        requests=len(answers),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token=Spread.of([answer.arrivals[0][0] for answer in answers if answer.arrivals]) if timed else None,
        inter_token=Spread.of(gaps, weights),
        repeated=sum(answer.tries > 1 for answer in answers),
    )


def _converse(endpoint: Endpoint, template: ChatTemplate, prompt: Prompt, asking: Asking, number: int) -> list[Answer]:
    """Returns the answers to a prompt's turns; a later one sees the server's own answers to those before it."""
    messages = prompt.messages
    answers: list[Answer] = []
    for turn in range(1 + len(prompt.later)):
        if turn:
            told = (Message("assistant", answers[-1].text), Message("user", prompt.later[turn - 1]))
            messages = (*messages, *told)
        answers.append(complete(endpoint, template.prompt_ids(messages), asking.request(number + turn)))
    return answers
