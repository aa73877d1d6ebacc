"""A small HTTP client for inference servers: JSON both ways, retries, and errors in the server's own words."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs
from attrs import field

from speculators.errors import ServerError
from speculators.structure.validators import server_url

Item = TypeVar("Item")
Result = TypeVar("Result")

COMPLETIONS = "/v1/completions"
# A bearer token for servers that require one. It is read from the environment only: recipes and command lines leak.
KEY = "SPECULATORS_API_KEY"
# A restart, a full queue or a proxy without its server answer with these. Any other 4xx would fail again.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# A proxy may answer with a whole page of HTML; its beginning is enough to recognise it.
_EXCERPT_CHARS = 400


@attrs.frozen(kw_only=True)
class Retry:
    """How often, and after what delay, a request that failed temporarily is sent again.

    Attributes:
        times: repetitions after the first attempt; 0 for none.
        first_seconds: delay before the first repetition. Each further delay is twice as long.
        longest_seconds: upper limit of one delay.
    """

    times: int = 5
    first_seconds: float = 0.5
    longest_seconds: float = 30.0

    def seconds(self, failures: int) -> float:
        """Computes the delay after this many failures in a row (at least 1)."""
        return min(self.first_seconds * 2.0 ** (failures - 1), self.longest_seconds)


def _root(url: str) -> str:
    """Removes `/v1`: people paste the URL that OpenAI clients expect, but our paths start with it."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_url(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    try:
        server_url(_, attribute, value)
    except ValueError:
        raise ServerError(f"{value!r} is not the URL of a server", hint="write http://HOST:PORT") from None


@attrs.frozen(kw_only=True)
class Endpoint:
    """A server that speaks HTTP and JSON. Threads may share it: each request opens its own connection.

    Attributes:
        url: with scheme. A path is kept, except for a final `/v1`.
        timeout: seconds to wait for the next bytes. Generous, because a long answer takes time to compute.
        retry: how to treat failures that may pass.
        key: sent as a bearer token; defaults to $SPECULATORS_API_KEY.
        stop: once set, pending retries give up (`in_flight` sets it when a request has failed for good).
    """

    url: str = field(converter=_root, validator=_is_url)
    timeout: float = 600.0
    retry: Retry = Retry()
    key: str | None = field(factory=lambda: os.environ.get(KEY) or None, repr=False)
    stop: threading.Event = field(factory=threading.Event, repr=False, eq=False)

    def get(self, path: str) -> Any:
        """Fetches the JSON value at a path such as "/v1/models". Raises as `post` does."""
        return self.patiently(lambda: self.send("GET", path))

    def get_text(self, path: str) -> str:
        """Fetches the text at a path such as "/metrics". Raises as `post` does."""
        return self.patiently(lambda: self._read("GET", path, None)).decode("utf-8", errors="replace")

    def post(self, path: str, body: Any) -> Any:
        """Sends a JSON value and returns the JSON value of the response.

        Raises:
            ServerError: the server refused the request, or failed more often than `retry` allows.
        """
        return self.patiently(lambda: self.send("POST", path, body))

    def stream(self, path: str, body: Any) -> Iterator[bytes]:
        """Sends a JSON value and yields the lines of the response as they arrive.

        Never retries: the caller has already consumed a part when the stream breaks.

        Raises:
            ServerError: the server refused the request, or the response broke off.
        """
        with self._response("POST", path, body) as response:
            while line := response.readline():
                yield line.rstrip(b"\r\n")

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """Makes a single attempt, for callers that retry a larger unit of work by `patiently`.

        Raises:
            ServerError: on any failure; `passes` says whether another attempt may succeed.
        """
        return _json(self._read(method, path, body), self.url + path)

    def patiently(self, attempt: Callable[[], Result]) -> Result:
        """Calls `attempt`, and again after growing delays while it fails for a passing reason.

        Raises:
            ServerError: the attempt's own, if it cannot pass or `retry` is exhausted.
        """
        failures = 0
        while True:
            try:
                return attempt()
            except ServerError as error:
                failures += 1
                if not error.passes or failures > self.retry.times:
                    raise error.after(failures) from error.__cause__
                if self.stop.wait(self.retry.seconds(failures)):
                    raise

    def _read(self, method: str, path: str, body: Any) -> bytes:
        with self._response(method, path, body) as response:
            return response.read()

    @contextmanager
    def _response(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        content = None if body is None else json.dumps(body).encode()
        where = self.url + path
        try:
            connection.request(method, parts.path + path, content, headers)
            response = connection.getresponse()
            if not 200 <= response.status < 300:
                raise _refused(where, response.status, response.read().decode("utf-8", errors="replace"))
            yield response
        except TimeoutError as error:
            raise ServerError(f"{where}: no answer in {self.timeout:g} s", passes=True) from error
        except ConnectionRefusedError as error:
            hint = "is the server running, and is this its address?"
            raise ServerError(f"{where}: connection refused", hint=hint, passes=True) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"{where}: the connection broke: {reason}", passes=True) from error
        finally:
            connection.close()


def _refused(where: str, status: int, text: str) -> ServerError:
    return ServerError(f"{where}: {status}: {_reason(text)}", status=status, passes=status in PASSING)


def _reason(text: str) -> str:
    """Extracts the message from a JSON error, or else the beginning of the text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    # OpenAI's form nests {"error": {"message": ...}}; FastAPI's has "detail".
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    message = value if isinstance(value, str) else text
    return _excerpt(message) or "the response is empty"


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        excerpt = _excerpt(content.decode("utf-8", errors="replace"))
        raise ServerError(f"{where}: the response is not JSON: {excerpt!r}") from None


def _excerpt(text: str) -> str:
    return " ".join(text.split())[:_EXCERPT_CHARS]


def in_flight(
    work: Callable[[Item], Result], items: Iterable[Item], *, concurrency: int, stop: threading.Event
) -> Iterator[tuple[Item, Result]]:
    """Works on several items at once, in threads, and yields each item with its result as soon as it is ready.

    The first failure ends everything: `stop` is set, no further item is started, results that were finished before are
    yielded, then the failure is raised. Leaving the generator early stops the threads as well.

    Args:
        work: called from several threads.
        items: consumed lazily, by one thread at a time.
        concurrency: items at once; at most as many finished results wait for the consumer.
        stop: set when this ends early; do not use it again afterwards.
    """
    assert not stop.is_set(), "`stop` is set by an earlier failure: give this work an endpoint of its own"
    source, turn, left = iter(items), threading.Lock(), threading.Event()
    # Bounded, so that threads do not run ahead of a slow consumer. None marks the end of one thread.
    results: queue.Queue[tuple[Item, Result] | BaseException | None] = queue.Queue(concurrency)

    def offer(value: tuple[Item, Result] | BaseException | None) -> None:
        # A plain `put` would block for ever once the consumer has left.
        while not left.is_set():
            try:
                return results.put(value, timeout=0.1)
            except queue.Full:
                pass

    def worker() -> None:
        try:
            while not stop.is_set():
                with turn:
                    item = next(source)
                offer((item, work(item)))
        except StopIteration:
            pass
        except BaseException as error:
            # Only the first failure is reported: the others are its consequence (`stop` ends their retries).
            first = not stop.is_set()
            stop.set()
            if first:
                offer(error)
        offer(None)

    # Daemon threads: one that waits for a response must not keep a failed process alive.
    threads = [threading.Thread(target=worker, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            value = results.get()
            if isinstance(value, BaseException):
                raise value
            if value is None:
                running -= 1
            else:
                yield value
    finally:
        left.set()
        if running:
            stop.set()
