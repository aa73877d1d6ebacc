"""Hidden states from one server: the checks before they are trusted, and the files that remain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeServer

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.engines import ServerIdentity
from speculators.servers.states_client import StatesClient
from speculators.servers.states_pool import StatesPool

WIDTH, NUM_LAYERS, LAYER_IDS = 3, 6, (4, 1)
IDS = torch.tensor([5, 9, 2, 7, 30])


def states_of(ids: list[int]) -> torch.Tensor:
    """States of layers 1, 4 and 6, [n, 3, H]; each value encodes its layer, token and place."""
    tokens = torch.tensor(ids, dtype=torch.float32)
    places = torch.arange(len(ids), dtype=torch.float32)
    layers = [1000 * layer + tokens + places / 8 for layer in (1, 4, 6)]
    return torch.stack(layers, 1)[..., None].repeat(1, 1, WIDTH)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "shared").mkdir()
    with FakeServer(tmp_path / "shared", states_of) as running:
        yield running


def client(server: FakeServer, *, times: int = 2, **changes) -> StatesPool:
    client = StatesClient(
        **{
            "endpoint": Endpoint(url=server.url, retry=Retry(times=times, first_seconds=0.001)),
            "model": "the-model",
            "folder": server.folder,
            "layer_ids": LAYER_IDS,
            "num_layers": NUM_LAYERS,
            "hidden_size": WIDTH,
            "dtype": torch.float32,
            "wait_seconds": 5.0,
            **changes,
        }
    )
    return StatesPool(clients=[client])


def test_states_come_in_the_order_of_the_layer_ids(server: FakeServer) -> None:
    """The server returns ascending layers and the last one; the client restores the order and removes the file."""
    chosen, last = client(server).capture(IDS)
    expected = states_of(IDS.tolist())
    assert torch.equal(chosen, torch.cat([expected[:, 1], expected[:, 0]], -1))
    assert torch.equal(last, expected[:, 2])
    assert list(server.folder.iterdir()) == []
    assert server.requests[0]["prompt"] == IDS.tolist()
    assert server.requests[0]["max_tokens"] == 1


def test_the_last_layer_may_be_among_the_chosen(server: FakeServer) -> None:
    """The server returns it once; the client returns it in both places."""
    chosen, last = client(server, layer_ids=(1, 4, 6)).capture(IDS)
    assert torch.equal(chosen[:, 2 * WIDTH :], last)


def test_a_file_is_read_when_it_is_complete(server: FakeServer) -> None:
    """The server goes on writing, under a lock, after it has answered."""
    server.seconds = 0.2
    chosen, _ = client(server).capture(IDS)
    assert torch.isfinite(chosen).all()


@pytest.mark.parametrize("fault", ["500", "drop", "no file", "torn"])
def test_passing_failures_are_requested_again(server: FakeServer, fault: str) -> None:
    """After a crash, a broken connection, or a missing or truncated file, the next attempt succeeds."""
    server.faults.extend([fault])
    assert len(client(server, wait_seconds=0.05).capture(IDS)[0]) == len(IDS)
    assert len(server.requests) == 2
    assert list(server.folder.iterdir()) == []


REFUSED = {
    "nan": r"the states of layers \[1\] are not finite",
    "tokens": r"different tokens: at place 2 the file has token 3, but 2 was sent",
    "short": r"5 tokens were sent, but 2 states of 2 tokens came back\nprefix caching and chunked",
    "layers": r"shape \[5, 2, 3\]; layers \[1, 4, 6\] of size 3 need \[5, 3, 3\]",
    "half": r"computed in float16, but the recipe requires float32\nstart it with --dtype float32",
    "no name": r"names no file of hidden states .*None.*\n`spec serve-states RECIPE` starts a server",
    "400": r"400: This model's maximum context length is 8 tokens",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_wrong_states_are_refused(server: FakeServer, fault: str) -> None:
    """There is no retry, since the result would be the same. The error says what to do; no file remains."""
    server.faults.extend([fault])
    with pytest.raises(ServerError, match=REFUSED[fault]):
        client(server).capture(IDS)
    assert len(server.requests) == 1
    assert list(server.folder.iterdir()) == []


def test_float32_is_accepted_for_every_dtype(server: FakeServer) -> None:
    """It is rounded when it is stored. Another 16-bit dtype differs from the recipe's."""
    assert len(client(server, dtype=torch.bfloat16).capture(IDS)[0]) == len(IDS)
    server.faults.extend(["half"])
    with pytest.raises(ServerError, match="computed in float16, but the recipe requires bfloat16"):
        client(server, dtype=torch.bfloat16).capture(IDS)


def test_a_path_outside_the_folder_is_neither_read_nor_removed(server: FakeServer) -> None:
    """The client deletes what it has read, so it must not trust the server's path."""
    precious = server.folder.parent / "precious.safetensors"
    precious.write_bytes(b"mine")
    server.faults.extend(["outside"])
    with pytest.raises(ServerError, match=r"which is not in .*shared\nit was started with a different folder"):
        client(server).capture(IDS)
    assert precious.read_bytes() == b"mine"


def test_a_link_out_of_the_folder_is_outside(server: FakeServer, tmp_path: Path) -> None:
    """Links are followed before paths are compared."""
    (tmp_path / "elsewhere").mkdir()
    (server.folder / "link").symlink_to(tmp_path / "elsewhere")
    server.faults.extend(["link"])
    with pytest.raises(ServerError, match="which is not in"):
        client(server).capture(IDS)


def test_a_file_that_never_comes_is_reported(server: FakeServer) -> None:
    """The error follows the last attempt; files that arrive late are removed at the end."""
    server.faults.extend(["no file"] * 3)
    impatient = client(server, wait_seconds=0.05)
    with pytest.raises(ServerError, match=r"still missing after 0\.05 s \(tried 3 times\)\ndo both sides see the same"):
        list(impatient.capture_all([(0, IDS)], concurrency=1))
    assert list(server.folder.iterdir()) == []


def test_many_are_captured_at_once(server: FakeServer) -> None:
    """Each result has its own index; several requests are under way, never more than allowed."""
    server.seconds = 0.01
    rows = [(index, torch.arange(2 + index % 5) + index) for index in range(30)]
    captured = {index: last for index, _, last in client(server).capture_all(iter(rows), concurrency=4)}
    assert captured.keys() == set(range(30))
    for index, ids in rows:
        assert torch.equal(captured[index], states_of(ids.tolist())[:, 2])
    assert 1 < server.most_at_once <= 4
    assert list(server.folder.iterdir()) == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_dying_server_stops_the_capture_with_its_own_words(server: FakeServer, concurrency: int) -> None:
    """Earlier results are yielded, except those in flight beside the failing request; the rest is not requested."""
    server.faults.extend([""] * 10 + ["500"] * 1000)
    finished = []
    work = client(server).capture_all(((index, IDS) for index in range(1000)), concurrency=concurrency)
    with pytest.raises(ServerError, match=r"EngineCore encountered an issue \(tried 3 times\)"):
        finished.extend(index for index, *_ in work)
    assert 10 - (concurrency - 1) <= len({*finished}) == len(finished) <= 10
    assert len(server.requests) < 10 + 3 * 3 + 3


def test_a_server_identifies_itself(server: FakeServer) -> None:
    """The identity has engine, version, model name, location and maximum length."""
    identity = ServerIdentity.at(Endpoint(url=server.url))
    assert identity == ServerIdentity(
        engine="vllm", version="0.32.0", model="the-model", root="/models/it", max_model_len=4096
    )


def test_a_server_without_models_is_refused(server: FakeServer) -> None:
    """Something that answers but lists no model is not an inference server."""
    server.model.clear()
    with pytest.raises(ServerError, match="lists no model\nis it an OpenAI-compatible server"):
        ServerIdentity.at(Endpoint(url=server.url))


def test_the_shared_folder_may_be_a_link(server: FakeServer, tmp_path: Path) -> None:
    """Both sides may name the same folder differently."""
    (tmp_path / "other-name").symlink_to(server.folder)
    assert len(client(server, folder=tmp_path / "other-name").capture(IDS)[0]) == len(IDS)
