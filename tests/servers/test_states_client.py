"""States out of a server: what is checked before they are believed, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeServer

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.states_client import StatesClient
from speculators.servers.engines import ServerIdentity

WIDTH, NUM_LAYERS, LAYER_IDS = 3, 6, (4, 1)
IDS = torch.tensor([5, 9, 2, 7, 30])


def states_of(ids: list[int]) -> torch.Tensor:
    """[n, 3, H]: those of layers 1, 4 and 6; every number tells its layer, token and place."""
    tokens = torch.tensor(ids, dtype=torch.float32)
    places = torch.arange(len(ids), dtype=torch.float32)
    layers = [1000 * layer + tokens + places / 8 for layer in (1, 4, 6)]
    return torch.stack(layers, 1)[..., None].repeat(1, 1, WIDTH)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "shared").mkdir()
    with FakeServer(tmp_path / "shared", states_of) as running:
        yield running


def client(server: FakeServer, *, times: int = 2, **changes) -> StatesClient:
    return StatesClient(
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


def test_states_come_in_the_order_of_the_layer_ids(server: FakeServer) -> None:
    """The server gives them sorted, with the last layer's; what was asked for is what is returned, and files go."""
    chosen, last = client(server).capture(IDS)
    expected = states_of(IDS.tolist())
    assert torch.equal(chosen, torch.cat([expected[:, 1], expected[:, 0]], -1))
    assert torch.equal(last, expected[:, 2])
    assert list(server.folder.iterdir()) == []
    assert server.requests[0]["prompt"] == IDS.tolist()
    assert server.requests[0]["max_tokens"] == 1


def test_the_last_layer_may_be_among_the_chosen(server: FakeServer) -> None:
    """It is asked for once, and given twice."""
    chosen, last = client(server, layer_ids=(1, 4, 6)).capture(IDS)
    assert torch.equal(chosen[:, 2 * WIDTH :], last)


def test_a_file_is_read_when_it_is_whole(server: FakeServer) -> None:
    """The server writes on after it has answered, under a lock."""
    server.seconds = 0.2
    chosen, _ = client(server).capture(IDS)
    assert torch.isfinite(chosen).all()


@pytest.mark.parametrize("fault", ["500", "drop", "no file", "torn"])
def test_what_may_pass_is_asked_for_again(server: FakeServer, fault: str) -> None:
    """A crash, a broken connection, a file that never comes or is cut off: the next attempt gives the states."""
    server.faults.extend([fault])
    assert len(client(server, wait_seconds=0.05).capture(IDS)[0]) == len(IDS)
    assert len(server.requests) == 2
    assert list(server.folder.iterdir()) == []


REFUSED = {
    "nan": r"the states of layers \[1\] are not finite",
    "tokens": r"the states are of other tokens: 3 at place 2, sent was 2",
    "short": r"5 tokens were sent, and 2 states of 2 tokens came back\nprefix caching does this",
    "layers": r"states of shape \[5, 2, 3\] came, for layers \[1, 4, 6\] of 3 it would be \[5, 3, 3\]",
    "half": r"computed in float16, and the recipe wants float32\nstart it with --dtype float32",
    "no name": r"names no file of hidden states .*None.*\nspec serve-states starts the server",
    "400": r"400: This model's maximum context length is 8 tokens",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_states_that_are_not_what_was_asked_for_are_refused(server: FakeServer, fault: str) -> None:
    """At once, for they would be the same again; with what was found and what to do; no file is left."""
    server.faults.extend([fault])
    with pytest.raises(ServerError, match=REFUSED[fault]):
        client(server).capture(IDS)
    assert len(server.requests) == 1
    assert list(server.folder.iterdir()) == []


def test_float32_is_good_for_every_type(server: FakeServer) -> None:
    """It is rounded when it is stored; 16 bits of another kind are not what the recipe says."""
    assert len(client(server, dtype=torch.bfloat16).capture(IDS)[0]) == len(IDS)
    server.faults.extend(["half"])
    with pytest.raises(ServerError, match="computed in float16, and the recipe wants bfloat16"):
        client(server, dtype=torch.bfloat16).capture(IDS)


def test_a_path_outside_the_folder_is_neither_read_nor_removed(server: FakeServer) -> None:
    """Whatever a server names: we remove what we have read."""
    precious = server.folder.parent / "precious.safetensors"
    precious.write_bytes(b"mine")
    server.faults.extend(["outside"])
    with pytest.raises(ServerError, match=r"which is not in .*shared\nit was started with another folder"):
        client(server).capture(IDS)
    assert precious.read_bytes() == b"mine"


def test_a_link_out_of_the_folder_is_outside(server: FakeServer, tmp_path: Path) -> None:
    """Paths are compared after links are followed."""
    (tmp_path / "elsewhere").mkdir()
    (server.folder / "link").symlink_to(tmp_path / "elsewhere")
    server.faults.extend(["link"])
    with pytest.raises(ServerError, match="which is not in"):
        client(server).capture(IDS)


def test_a_file_that_never_comes_is_told_with_both_places(server: FakeServer) -> None:
    """After all attempts; a file that came late is removed at the end."""
    server.faults.extend(["no file"] * 3)
    asked = client(server, wait_seconds=0.05)
    with pytest.raises(
        ServerError, match=r"after 0\.05 s nothing is there \(tried 3 times\)\ndo both sides see the same"
    ):
        list(asked.capture_all([(0, IDS)], concurrency=1))
    assert list(server.folder.iterdir()) == []


def test_many_are_captured_at_once(server: FakeServer) -> None:
    """Each with its own index, never more at once than allowed, and more than one."""
    server.seconds = 0.01
    rows = [(index, torch.arange(2 + index % 5) + index) for index in range(30)]
    found = {index: last for index, _, last in client(server).capture_all(iter(rows), concurrency=4)}
    assert found.keys() == set(range(30))
    for index, ids in rows:
        assert torch.equal(found[index], states_of(ids.tolist())[:, 2])
    assert 1 < server.most_at_once <= 4
    assert list(server.folder.iterdir()) == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_server_that_dies_stops_the_capture_in_its_own_words(server: FakeServer, concurrency: int) -> None:
    """What came before is yielded, but for what is under way beside the one that fails; the rest is not asked for."""
    server.faults.extend([""] * 10 + ["500"] * 1000)
    found = []
    work = client(server).capture_all(((index, IDS) for index in range(1000)), concurrency=concurrency)
    with pytest.raises(ServerError, match=r"EngineCore encountered an issue \(tried 3 times\)"):
        found.extend(index for index, *_ in work)
    assert 10 - (concurrency - 1) <= len({*found}) == len(found) <= 10
    assert len(server.requests) < 10 + 3 * 3 + 3


def test_a_server_says_what_it_is(server: FakeServer) -> None:
    """Engine, version, the name to use, where the model is and how long it may get."""
    told = ServerIdentity.at(Endpoint(url=server.url))
    assert told == ServerIdentity(engine="vllm", version="0.32.0", model="the-model", root="/models/it", max_model_len=4096)


def test_something_else_than_a_model_server_is_told(server: FakeServer) -> None:
    """It answers, and names no model."""
    server.model.clear()
    with pytest.raises(ServerError, match="names no model\nis it an OpenAI-compatible server"):
        ServerIdentity.at(Endpoint(url=server.url))


def test_the_shared_folder_may_be_told_relative_to_a_link(server: FakeServer, tmp_path: Path) -> None:
    """A folder is the same by any of its names."""
    (tmp_path / "other-name").symlink_to(server.folder)
    assert len(client(server, folder=tmp_path / "other-name").capture(IDS)[0]) == len(IDS)
