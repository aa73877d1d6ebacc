"""One completion as it streams in from an OpenAI-compatible server: its tokens, and when each came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint

PATH = "/v1/completions"


@attrs.frozen(kw_only=True)
class Answer:
    """One completion.

    Attributes:
        text: all of it.
        tokens: as the server counts them, an end token included.
        seconds: from sending to the last piece.
        arrivals: (seconds since sending, tokens so far) of each piece that brought tokens. () where the server tells
            their number only at the end.
        tries: 1 if the first one succeeded.
    """

    text: str
    tokens: int
    seconds: float
    arrivals: tuple[tuple[float, int], ...]
    tries: int = 1

    @property
    def steps(self) -> int:
        """Pieces after the first, which the prefill brought: at least so many rounds were made."""
        return max(0, len(self.arrivals) - 1)


def complete(endpoint: Endpoint, prompt: Sequence[int], request: dict[str, Any]) -> Answer:
    """Returns the completion of a prompt's tokens.

    Args:
        request: the other fields (`model`, `max_tokens`, `temperature`, ...).

    Raises:
        ServerError: the server refuses, or fails in a passing way more often than the endpoint's `retry` allows.
    """
    body = {
        **request,
        "prompt": list(prompt),
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
    }
    tries = 0

    def attempt() -> Answer:
        nonlocal tries
        tries += 1
        sent = time.perf_counter()
        return read_stream(endpoint.stream(PATH, body), sent, endpoint.url)

    return attrs.evolve(endpoint.patiently(attempt), tries=tries)


def read_stream(lines: Iterable[bytes], sent: float, where: str) -> Answer:
    """Reads server-sent events up to [DONE]; a stream that ends before is no answer.

    Args:
        sent: by `time.perf_counter`.
        where: for errors.
    """
    text: list[str] = []
    arrivals: list[tuple[float, int]] = []
    total, told, now = 0, 0, 0.0
    for event in _events(lines, where):
        now = time.perf_counter() - sent
        choices = event.get("choices") or ()
        for choice in choices:
            text.append(choice.get("text") or "")
            told += len(choice.get("token_ids") or ())
        # A server that counts only at the end may tell the ids of each piece.
        known = (event.get("usage") or {}).get("completion_tokens") or told
        if known > total:
            total = known
            # The closing event, which has no choice, tells of what was not seen arriving.
            if choices:
                arrivals.append((now, total))
    seen = bool(arrivals) and arrivals[-1][1] == total
    return Answer(
        text="".join(text),
        tokens=total,
        seconds=now,
        arrivals=tuple(arrivals) if seen else (),
    )


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
            raise ServerError(f"{where}: streams what is not JSON: {content[:200]!r}") from None
        if not isinstance(event, dict):
            raise ServerError(f"{where}: streams what is no event: {content[:200]!r}")
        # Some servers say "error": null where there is none.
        if (told := event.get("error")) is not None:
            words = told.get("message", told) if isinstance(told, dict) else told
            raise ServerError(f"{where}: broke off an answer: {words}")
        yield event
    raise ServerError(f"{where}: an answer ended before its [DONE]", passes=True)
