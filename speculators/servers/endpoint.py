"""A small HTTP client for inference servers: JSON both ways, patience with what passes, the server's own words."""

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

# A bearer token for servers that want one; no recipe and no command line is a place for it.
KEY = "SPECULATORS_API_KEY"
# What a restart, a full queue or a proxy without its server answers; the rest of 4xx will be the same next time.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# Of a page of HTML that a proxy answers with, the beginning tells enough.
_WORDS = 400


@attrs.frozen(kw_only=True)
class Retry:
    """How often and how soon a request that failed in a passing way is sent again.

    Attributes:
        times: after the first attempt; 0 for none.
        first_seconds: before the first repetition; each further wait is twice as long.
        longest_seconds: of one wait.
    """

    times: int = 5
    first_seconds: float = 0.5
    longest_seconds: float = 30.0

    def seconds(self, failures: int) -> float:
        """Returns how long to wait after so many failures in a row, 1 being the first."""
        return min(self.first_seconds * 2.0 ** (failures - 1), self.longest_seconds)


def _root(url: str) -> str:
    """People paste the URL that OpenAI clients want, which ends in /v1; here paths begin with it."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_url(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    try:
        server_url(_, attribute, value)
    except ValueError:
        raise ServerError(f"{value!r} is not the URL of a server", hint="write http://HOST:PORT") from None


@attrs.frozen(kw_only=True)
class Endpoint:
    """A server that speaks HTTP and JSON. Safe to share between threads: each request has its own connection.

    Attributes:
        url: with scheme; a path is kept, `/v1` at its end is not.
        timeout: seconds in which the server must say something: an answer can be long in the making.
        retry: what is done about failures that pass.
        key: sent as bearer token; $SPECULATORS_API_KEY, if that is set.
        stop: once set, nobody waits any longer to try again (`in_flight` sets it when a request has failed for good).
    """

    url: str = field(converter=_root, validator=_is_url)
    timeout: float = 600.0
    retry: Retry = Retry()
    key: str | None = field(factory=lambda: os.environ.get(KEY) or None, repr=False)
    stop: threading.Event = field(factory=threading.Event, repr=False, eq=False)

    def get(self, path: str) -> Any:
        """Returns the JSON value at a path such as "/v1/models". Raises as `post` does."""
        return self.patiently(lambda: self.send("GET", path))

    def get_text(self, path: str) -> str:
        """Returns the text at a path such as "/metrics". Raises as `post` does."""
        return self.patiently(lambda: self._read("GET", path, None)).decode("utf-8", errors="replace")

    def post(self, path: str, body: Any) -> Any:
        """Sends a JSON value and returns the one that is answered.

        Raises:
            ServerError: it refused, with its own words; or it failed in a passing way more often than `retry` allows.
        """
        return self.patiently(lambda: self.send("POST", path, body))

    def stream(self, path: str, body: Any) -> Iterator[bytes]:
        """Sends a JSON value and yields the lines of the answer as they come; never repeated, for half is told by then.

        Raises:
            ServerError: it refused, or the answer broke off.
        """
        with self._answer("POST", path, body) as response:
            while line := response.readline():
                yield line.rstrip(b"\r\n")

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """Makes one attempt and returns the JSON value that is answered; for those who are patient with more than it.

        Raises:
            ServerError: whatever went wrong; its `passes` says whether another attempt makes sense.
        """
        return _json(self._read(method, path, body), self.url + path)

    def patiently(self, attempt: Callable[[], Result]) -> Result:
        """Returns what `attempt` does, which is called again, ever later, after failures that pass.

        Raises:
            ServerError: the attempt's, if it does not pass, or there were more than `retry` allows.
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
        with self._answer(method, path, body) as response:
            return response.read()

    @contextmanager
    def _answer(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """One attempt."""
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
            words = str(error) or type(error).__name__
            raise ServerError(f"{where}: the connection broke: {words}", passes=True) from error
        finally:
            connection.close()


def _refused(where: str, status: int, text: str) -> ServerError:
    return ServerError(f"{where}: {status}: {_words(text)}", status=status, passes=status in PASSING)


def _words(text: str) -> str:
    """Returns what the server says is wrong: of JSON its message, else the beginning of the text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    told = value if isinstance(value, str) else text
    return " ".join(told.split())[:_WORDS] or "no words"


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        told = " ".join(content.decode("utf-8", errors="replace").split())[:_WORDS]
        raise ServerError(f"{where}: answered something else than JSON: {told!r}") from None


def in_flight(
    work: Callable[[Item], Result], items: Iterable[Item], *, concurrency: int, stop: threading.Event
) -> Iterator[tuple[Item, Result]]:
    """Works on several items at once, in threads, and yields each with its result as soon as it is there.

    The first failure opens the circuit: `stop` is set, no further item is begun, what was finished before it is
    yielded, then it is raised. Nor does anything run on when the consumer leaves.

    Args:
        work: called from several threads.
        items: read as they are needed, by one thread at a time.
        concurrency: items at once; at most as many finished ones wait for the consumer.
        stop: set where this ends early, and not to be used again.
    """
    assert not stop.is_set(), "the circuit is open: work goes on with an endpoint of its own"
    source, turn, left = iter(items), threading.Lock(), threading.Event()
    found: queue.Queue[tuple[Item, Result] | BaseException | None] = queue.Queue(concurrency)

    def offer(value: tuple[Item, Result] | BaseException | None) -> None:
        while not left.is_set():
            try:
                return found.put(value, timeout=0.1)
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
            first = not stop.is_set()
            stop.set()
            if first:
                offer(error)
        offer(None)

    # Daemons: one that waits for a server's answer must not keep a process that has failed from ending.
    threads = [threading.Thread(target=worker, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            value = found.get()
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
