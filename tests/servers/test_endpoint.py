"""The HTTP client: what is tried again, what is not, and whose words are told."""

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
def test_what_may_pass_is_tried_again(server: FakeServer, fault: str) -> None:
    """A server that is being restarted, is full, or hides behind a proxy answers in the end."""
    server.faults.extend([fault, fault])
    assert Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)["choices"]
    assert len(server.requests) == 3


def test_it_ends_with_the_servers_own_words(server: FakeServer) -> None:
    """After the last attempt the error says what the server said, and how often it was asked."""
    server.faults.extend(["500"] * 3)
    with pytest.raises(ServerError, match=r"500: EngineCore encountered an issue \(tried 3 times\)") as caught:
        Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)
    assert caught.value.status == 500


def test_what_will_not_pass_is_told_at_once(server: FakeServer) -> None:
    """A refusal is the same the next time."""
    server.faults.extend(["400"])
    with pytest.raises(ServerError, match=r"400: This model's maximum context length is 8 tokens\.$"):
        Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)
    assert len(server.requests) == 1


def test_a_page_of_a_proxy_is_told_by_its_beginning(server: FakeServer) -> None:
    """Not everything that answers is the server."""
    server.faults.extend(["html"])
    with pytest.raises(ServerError, match=r"502: <html> <h1>Bad Gateway</h1> nobody is there</html>"):
        Endpoint(url=server.url, retry=Retry(times=0)).post("/v1/completions", BODY)


def test_something_else_than_json_is_told(server: FakeServer) -> None:
    """With what it was."""
    server.faults.extend(["no json"])
    with pytest.raises(ServerError, match=r"something else than JSON: 'hello'"):
        Endpoint(url=server.url, retry=SOON).post("/v1/completions", BODY)


def test_a_server_that_is_not_there_is_told_with_its_address() -> None:
    """After it has had its time to start."""
    url = closed_port()
    with pytest.raises(ServerError, match=rf"{url}/v1/models: connection refused \(tried 3 times\)\nis the server run"):
        Endpoint(url=url, retry=SOON).get("/v1/models")


def test_a_server_that_says_nothing_is_not_waited_for_forever(server: FakeServer) -> None:
    """The timeout is in the words."""
    server.faults.extend(["silent"])
    with pytest.raises(ServerError, match=r"no answer in 0\.1 s"):
        Endpoint(url=server.url, timeout=0.1, retry=Retry(times=0)).post("/v1/completions", BODY)


def test_waits_double_up_to_the_longest() -> None:
    """So that a server that starts is not drowned in requests."""
    retry = Retry(first_seconds=0.5, longest_seconds=3.0)
    assert [retry.seconds(failures) for failures in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_be_the_one_that_clients_want(server: FakeServer, end: str) -> None:
    """With or without /v1."""
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
def test_what_is_no_url_is_refused(url: str) -> None:
    """Before anything is sent: no such port, no such name of a host."""
    with pytest.raises(ServerError, match="is not the URL of a server\nwrite http://HOST:PORT"):
        Endpoint(url=url)


def test_a_key_is_sent_and_never_shown(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from the environment, as a recipe is no place for it."""
    monkeypatch.setenv("SPECULATORS_API_KEY", "secret")
    endpoint = Endpoint(url=server.url)
    endpoint.get("/v1/models")
    assert server.keys == ["Bearer secret"]
    assert "secret" not in repr(endpoint)


def test_lines_come_as_they_are_sent(server: FakeServer) -> None:
    """A stream is read line by line, and a refusal of it is told as any."""
    assert len(list(Endpoint(url=server.url).stream("/v1/completions", BODY))) == 1
    server.faults.extend(["500"])
    with pytest.raises(ServerError, match="500: EngineCore"):
        list(Endpoint(url=server.url).stream("/v1/completions", BODY))


def test_work_is_done_at_once_and_all_of_it() -> None:
    """Never more than allowed; items are read as there is room for them."""
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

    stop, found = threading.Event(), {}
    for item, result in in_flight(work, items(), concurrency=4, stop=stop):
        found[item] = result
        # In the hands of four threads, waiting in the queue, here.
        assert read <= len(found) + 4 + 4 + 1
    assert found == {item: item * item for item in range(40)}
    assert most == 4
    assert not stop.is_set()


def test_the_first_failure_stops_everybody() -> None:
    """What was finished is yielded, nothing new is begun, nobody goes on waiting, and the error is the first one."""
    stop, begun = threading.Event(), []

    def work(item: int) -> int:
        begun.append(item)
        if item == 5:
            time.sleep(0.05)
            raise ServerError("the engine is dead")
        if item > 5 and stop.wait(10):
            raise ServerError("stopped while it waited")
        return item

    found = []
    working = in_flight(work, iter(range(1000)), concurrency=2, stop=stop)
    with pytest.raises(ServerError, match="the engine is dead"):
        found.extend(item for item, _ in working)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert len(begun) <= 8


def test_a_consumer_that_leaves_stops_it() -> None:
    """No thread works on for nobody."""
    stop, begun = threading.Event(), []
    work = in_flight(lambda item: begun.append(item), iter(range(1000)), concurrency=2, stop=stop)
    next(work)
    work.close()
    assert stop.is_set()
    time.sleep(0.05)
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count < 20


def test_an_error_of_the_items_is_raised() -> None:
    """A conversation that cannot be read ends the capture, in the reader's words."""

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        list(in_flight(lambda item: item, items(), concurrency=3, stop=threading.Event()))
