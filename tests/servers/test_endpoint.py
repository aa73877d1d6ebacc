"""The HTTP client: which failures it retries, and which error it reports."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_vllm import FakeServer

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint, Retry, in_flight

SOON = Retry(times=2, first_seconds=0.001)
BODY = {"prompt": [1, 2, 3]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path) as running:
        yield running


def closed_port() -> str:
    """The URL of a port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("fault", ["500", "429", "html", "drop"])
def test_passing_failures_are_retried(server: FakeServer, fault: str) -> None:
    """A server that restarts, is full, or sits behind a proxy answers in the end."""
    server.faults.extend([fault, fault])
    assert Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)["choices"]
    assert len(server.requests) == 3


def test_the_last_error_has_the_servers_own_words(server: FakeServer) -> None:
    """The error after the last attempt quotes the server and gives the number of attempts."""
    server.faults.extend(["500"] * 3)
    with pytest.raises(ServerError, match=r"500: EngineCore encountered an issue \(tried 3 times\)") as caught:
        Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)
    assert caught.value.status == 500


def test_a_refusal_is_reported_at_once(server: FakeServer) -> None:
    """A repetition would be refused as well."""
    server.faults.extend(["400"])
    with pytest.raises(ServerError, match=r"400: This model's maximum context length is 8 tokens\.$"):
        Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)
    assert len(server.requests) == 1


def test_the_error_quotes_the_beginning_of_a_proxys_page(server: FakeServer) -> None:
    """A proxy may answer in place of the server."""
    server.faults.extend(["html"])
    with pytest.raises(ServerError, match=r"502: <html> <h1>Bad Gateway</h1> nobody is there</html>"):
        Endpoint(url=server.url, retry=Retry(times=0)).post("/v1/completions", BODY)


def test_a_response_that_is_not_json_is_quoted(server: FakeServer) -> None:
    """The error shows what came instead."""
    server.faults.extend(["no json"])
    with pytest.raises(ServerError, match=r"the response is not JSON: 'hello'"):
        Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)


def test_an_unreachable_server_is_reported_with_its_address() -> None:
    """Retries give it time to start first."""
    url = closed_port()
    with pytest.raises(ServerError, match=rf"{url}/v1/models: connection refused \(tried 3 times\)\nis the server run"):
        Endpoint(url=url, retry=SOON).get("/v1/models")


def test_a_silent_server_times_out(server: FakeServer) -> None:
    """The error gives the timeout."""
    server.faults.extend(["silent"])
    with pytest.raises(ServerError, match=r"no answer in 0\.1 s"):
        Endpoint(url=server.url, timeout=0.1, retry=Retry(times=0)).post("/v1/completions", BODY)


def test_waits_double_up_to_the_longest() -> None:
    """A server that is starting must not drown in requests."""
    retry = Retry(first_seconds=0.5, longest_seconds=3.0)
    assert [retry.seconds(failures) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1(server: FakeServer, end: str) -> None:
    """OpenAI clients expect such a URL, so people paste it."""
    assert Endpoint(url=server.url + end).get("/v1/models")["data"][0]["id"] == "the-model"
    assert Endpoint(url=server.url + end).get_text("/metrics") == "up 1\n"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://127.0.0.1:abc",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://[::1",
        "http://ho st:1",
        f"http://{'a' * 64}:1",
    ],
)
def test_an_invalid_url_is_refused(url: str) -> None:
    """Bad ports and host names are found before anything is sent."""
    with pytest.raises(ServerError, match="is not the URL of a server\nwrite http://HOST:PORT"):
        Endpoint(url=url)


def test_a_key_is_sent_and_never_shown(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key comes from the environment, never from a recipe."""
    monkeypatch.setenv("SPECULATORS_API_KEY", "secret")
    endpoint = Endpoint(url=server.url)
    endpoint.get("/v1/models")
    assert server.keys == ["Bearer secret"]
    assert "secret" not in repr(endpoint)


def test_a_stream_is_read_line_by_line(server: FakeServer) -> None:
    """A refused stream raises the server's error as any other request does."""
    assert len(list(Endpoint(url=server.url).stream("/v1/completions", BODY))) == 1
    server.faults.extend(["500"])
    with pytest.raises(ServerError, match="500: EngineCore"):
        list(Endpoint(url=server.url).stream("/v1/completions", BODY))


def test_all_items_are_worked_on_concurrently() -> None:
    """Never more at once than allowed; items are consumed lazily."""
    lock, now, most, read = threading.Lock(), 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(40):
            read += 1
            yield item

    def work(item: int) -> int:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.002)
        with lock:
            now -= 1
        return item * item

    stop, results = threading.Event(), {}
    for item, result in in_flight(work, items(), concurrency=4, stop=stop):
        results[item] = result
        # Four items in the threads, four in the queue, one here.
        assert read <= len(results) + 4 + 4 + 1
    assert results == {item: item * item for item in range(40)}
    assert most == 4
    assert not stop.is_set()


def test_the_first_failure_stops_all_threads() -> None:
    """Finished results are yielded, nothing new starts, retries end, and the first error is raised."""
    stop, begun = threading.Event(), []

    def work(item: int) -> int:
        begun.append(item)
        if item == 5:
            time.sleep(0.05)
            raise ServerError("the engine is dead")
        if item > 5 and stop.wait(10):
            raise ServerError("stopped while it waited")
        return item

    finished = []
    working = in_flight(work, iter(range(1000)), concurrency=2, stop=stop)
    with pytest.raises(ServerError, match="the engine is dead"):
        finished.extend(item for item, _ in working)
    assert sorted(finished) == [0, 1, 2, 3, 4]
    assert len(begun) <= 8


def test_a_consumer_that_leaves_stops_the_threads() -> None:
    """No thread goes on working without a consumer."""
    stop, begun = threading.Event(), []
    work = in_flight(lambda item: begun.append(item), iter(range(1000)), concurrency=2, stop=stop)
    next(work)
    work.close()
    assert stop.is_set()
    time.sleep(0.05)
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count < 20


def test_an_error_of_the_items_iterator_is_raised() -> None:
    """An unreadable conversation ends the capture with the reader's own error."""

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        list(in_flight(lambda item: item, items(), concurrency=3, stop=threading.Event()))
