"""How processes find each other where torchrun's agents keep what former processes left."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from datetime import timedelta

import pytest
import torch.distributed as dist

from speculators.errors import TrainingError
from speculators.training.rendezvous import fresh_store

PATIENCE = timedelta(seconds=30)


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The agents' store after a restart: a process that has died left its port, and a value."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as former:
        former.bind(("localhost", 0))
        store.set("speculators/port", str(former.getsockname()[1]))
    store.set("address", "of a dead process")
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
    }.items():
        monkeypatch.setenv(name, value)
    return store


def test_processes_do_not_read_what_former_ones_left(agents: dist.TCPStore) -> None:
    """One that arrives first waits for the first process of its own start; their store is empty at that moment."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(fresh_store, 1, PATIENCE)
        with pytest.raises(StillWaiting):
            waiting.result(timeout=0.5)
        first = fresh_store(0, PATIENCE)
        second = waiting.result(timeout=30)
    assert first is not None
    assert second is not None
    assert not second.check(["address"])
    first.set("address", "of a living process")
    assert second.get("address") == b"of a living process"


@pytest.mark.usefixtures("agents")
def test_a_first_process_that_never_comes_is_reported() -> None:
    """With its address, after the patience that the launch has."""
    with pytest.raises(TrainingError, match=r"process 0 does not answer at localhost:\d+"):
        fresh_store(1, timedelta(seconds=0.3))


def test_without_agents_torch_finds_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that sets the environment alone has no store that outlives the processes."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert fresh_store(0, PATIENCE) is None
