"""Streams one completion from an OpenAI-compatible server, recording when its tokens arrive."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from speculators.errors import ServerError
from speculators.servers.endpoint import COMPLETIONS, Endpoint


@attrs.frozen(kw_only=True)
class ReportedRounds:
    """What a server says about the rounds of one answer.

    Attributes:
        accepted: number of accepted drafts of each round, in order, those past the end of the answer included.
        num_speculative_tokens: K.
    """

    accepted: tuple[int, ...]
    num_speculative_tokens: int


@attrs.frozen(kw_only=True)
class Completion:
    """One streamed completion.

    Attributes:
        text: the whole answer.
        tokens: as the server counts them, an end token included.
        seconds: from sending the request to the last chunk.
        arrivals: (seconds since sending, tokens so far) for each chunk that brought tokens; () if the server reports
            the number of tokens only at the end.
        tries: requests that were needed; 1 if the first succeeded.
        prompt: the token ids that were sent.
        ids: of the answer; () if the server does not list them.
        rounds: as the server reports them with the answer; None if it does not.
    """

    text: str
    tokens: int
    seconds: float
    arrivals: tuple[tuple[float, int], ...]
    tries: int = 1
    prompt: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    rounds: ReportedRounds | None = None

    @property
    def steps(self) -> int:
        """Chunks after the first, which the prefill produced: a lower bound of the number of rounds."""
        return max(0, len(self.arrivals) - 1)


def complete(endpoint: Endpoint, prompt: Sequence[int], request: dict[str, Any]) -> Completion:
    """Completes a prompt given as token ids.

    Args:
        endpoint: of the server.
        prompt: token ids.
        request: the other fields (`model`, `max_tokens`, `temperature`, ...).

    Raises:
        ServerError: the server refused, or failed more often than the endpoint's `retry` allows.
    """
    body = {
        **request,
        "prompt": list(prompt),
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
    }
    tries = 0

    def attempt() -> Completion:
        nonlocal tries
        tries += 1
        sent = time.perf_counter()
        return read_stream(endpoint.stream(COMPLETIONS, body), sent, endpoint.url)

    return attrs.evolve(endpoint.patiently(attempt), tries=tries, prompt=tuple(prompt))


def read_stream(lines: Iterable[bytes], sent: float, where: str) -> Completion:
    """Reads server-sent events up to [DONE]. A stream that ends before it is an error, not a short answer.

    Args:
        lines: of the response.
        sent: `time.perf_counter()` when the request was sent.
        where: the server's address, for errors.
    """
    text: list[str] = []
    arrivals: list[tuple[float, int]] = []
    ids: list[int] = []
    rounds: ReportedRounds | None = None
    total, now = 0, 0.0
    for event in _events(lines, where):
        now = time.perf_counter() - sent
        choices = event.get("choices") or ()
        for choice in choices:
            text.append(choice.get("text") or "")
            ids += choice.get("token_ids") or ()
        # A server without continuous usage statistics may still list the token ids of each chunk.
        count = (event.get("usage") or {}).get("completion_tokens") or len(ids)
        rounds = _reported_rounds(event) or rounds
        if count > total:
            total = count
            # The closing event has no choice: tokens counted only there arrived unseen, and have no time.
            if choices:
                arrivals.append((now, total))
    complete_timing = bool(arrivals) and arrivals[-1][1] == total
    return Completion(
        text="".join(text),
        tokens=total,
        seconds=now,
        arrivals=tuple(arrivals) if complete_timing else (),
        ids=tuple(ids),
        rounds=rounds,
    )


def _reported_rounds(event: Mapping[str, Any]) -> ReportedRounds | None:
    """Reads vLLM's `metrics.speculative_decoding`; None without it, and without the rounds one by one."""
    report = (event.get("metrics") or {}).get("speculative_decoding")
    if not report:
        return None
    accepted = report.get("per_step_accepted")
    # An answer of one token has no round, and then vLLM leaves the list out even where it reports details.
    if accepted is None and report["num_spec_steps"]:
        return None
    return ReportedRounds(accepted=tuple(accepted or ()), num_speculative_tokens=report["num_spec_tokens"])


def _events(lines: Iterable[bytes], where: str) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        content = line[5:].strip()
        if content == b"[DONE]":
            return
        try:
            event = json.loads(content)
        except ValueError:
            raise ServerError(f"{where}: streamed something that is not JSON: {content[:200]!r}") from None
        if not isinstance(event, dict):
            raise ServerError(f"{where}: streamed JSON that is not an event: {content[:200]!r}")
        # Some servers send "error": null in every event.
        if (error := event.get("error")) is not None:
            message = error.get("message", error) if isinstance(error, dict) else error
            raise ServerError(f"{where}: broke off an answer: {message}")
        yield event
    raise ServerError(f"{where}: an answer ended before its [DONE]", passes=True)
