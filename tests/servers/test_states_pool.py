"""Several servers of hidden states: shared work, another server after a failure, and servers that are left out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeServer

from speculators.errors import ServerError
from speculators.servers import states_pool
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.states_client import StatesClient
from speculators.servers.states_pool import StatesPool

IDS = torch.tensor([5, 9, 2, 7, 30])


def states_of(ids: list[int]) -> torch.Tensor:
    """States of two layers of size 1, [n, 2, 1]: the token, and its negative."""
    return torch.stack([torch.tensor(ids), -torch.tensor(ids)], 1)[..., None].float()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[FakeServer]]:
    with FakeServer(tmp_path, states_of) as one, FakeServer(tmp_path, states_of) as other:
        yield [one, other]


def pool_of(servers: list[FakeServer], *, times: int = 2) -> tuple[StatesPool, list[str]]:
    """A pool of these servers, and the sentences that it reports."""
    reports: list[str] = []
    clients = [
        StatesClient(
            endpoint=Endpoint(url=server.url, retry=Retry(times=times, first_seconds=0.001)),
            model="the-model",
            folder=server.folder,
            layer_ids=(0,),
            num_layers=4,
            hidden_size=1,
            dtype=torch.float32,
        )
        for server in servers
    ]
    return StatesPool(clients=clients, name=lambda index: f"row-{index}", report=reports.append), reports


def captured(pool: StatesPool, count: int, concurrency: int = 4) -> dict[int, torch.Tensor]:
    """The last states of `count` sequences, each of its own tokens; every one has arrived once."""
    rows = [(index, IDS + index) for index in range(count)]
    arrived = [(index, last) for index, _, last in pool.capture_all(iter(rows), concurrency=concurrency)]
    assert sorted(index for index, _ in arrived) == list(range(count))
    for index, last in arrived:
        assert torch.equal(last[:, 0], -(IDS + index).float())
    return dict(arrived)


def test_servers_share_the_work(servers: list[FakeServer]) -> None:
    """Each gets every second request where they are equally fast."""
    pool, reports = pool_of(servers)
    captured(pool, 20, concurrency=1)
    assert [len(server.requests) for server in servers] == [10, 10]
    assert reports == []


def test_a_slow_server_gets_less_of_the_work(servers: list[FakeServer]) -> None:
    """The other one answers while its requests are open."""
    servers[0].seconds = 0.2
    captured(pool_of(servers)[0], 40)
    assert len(servers[0].requests) < len(servers[1].requests)


def test_a_server_that_dies_is_replaced_by_the_others(servers: list[FakeServer], monkeypatch) -> None:
    """Nothing is lost; after three failures in a row it is left out, with the reason, and gets no request any more."""
    pool, reports = pool_of(servers)
    captured(pool, 6)
    servers[0].die()
    captured(pool, 30)
    (report,) = reports
    assert report.startswith(f"{servers[0].url}/v1/completions: connection refused: this server is left out after 3")
    tries: list[StatesClient] = []
    attempt = StatesClient.attempt
    monkeypatch.setattr(StatesClient, "attempt", lambda self, ids: tries.append(self) or attempt(self, ids))
    captured(pool, 10)
    assert tries == [pool.clients[1]] * 10


def test_a_server_that_was_left_out_comes_back(servers: list[FakeServer], monkeypatch) -> None:
    """After the pause one request tries it; when that succeeds, the server is reported and shares the work again."""
    pool, reports = pool_of(servers)
    servers[0].faults.extend(["500"] * 3)
    captured(pool, 10, concurrency=1)
    assert ("EngineCore encountered an issue" in reports[0], len(reports)) == (True, 1)
    before = len(servers[0].requests)
    clock = states_pool.time.monotonic
    monkeypatch.setattr(states_pool.time, "monotonic", lambda: clock() + states_pool.PAUSE_SECONDS)
    captured(pool, 10, concurrency=1)
    assert reports[1:] == [f"{servers[0].url}: answers again"]
    assert len(servers[0].requests) > before + 3


def test_the_last_failure_is_raised_when_no_server_answers(servers: list[FakeServer]) -> None:
    """Each round asks both; the error names the conversation, the server, its message and the number of rounds."""
    pool, _ = pool_of(servers)
    for server in servers:
        server.faults.extend(["500"] * 3)
    message = rf"conversation row-7: ({'|'.join(s.url for s in servers)}).*EngineCore.*\(tried 3 times\)"
    with pytest.raises(ServerError, match=message):
        list(pool.capture_all([(7, IDS)], concurrency=1))
    assert [len(server.requests) for server in servers] == [3, 3]


@pytest.mark.parametrize("fault", ["tokens", "nan", "short"])
def test_wrong_states_are_not_requested_elsewhere(servers: list[FakeServer], fault: str) -> None:
    """A server that returns them is configured wrongly: training on the others' would hide it."""
    servers[1].faults.extend(repeat(fault, 9))
    with pytest.raises(ServerError, match=f"conversation row-1: {servers[1].url}, cmpl"):
        list(pool_of(servers)[0].capture_all([(0, IDS), (1, IDS)], concurrency=1))
    assert [path.name for path in servers[0].folder.iterdir()] == []
