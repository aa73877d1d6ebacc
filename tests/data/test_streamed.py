"""Streamed states: requested ahead of training within a window, handed out once, equal to a store's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from data_toys import fake_capture

from speculators.data.capture import OnlineStates
from speculators.data.encoded import Conversations
from speculators.data.streamed import StreamedStates
from speculators.errors import ServerError


class Servers:
    """A stream that answers in pairs, the later conversation first, until it fails."""

    def __init__(self, fails_after: int = 1000) -> None:
        self.fails_after = fails_after
        self.requested: list[int] = []
        self.cancelled = False

    def __call__(self, rows: Iterator) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        while pair := list(islice(rows, 2)):
            for index, ids in reversed(pair):
                if len(self.requested) == self.fails_after:
                    raise ServerError("all servers are gone")
                self.requested.append(index)
                ((_, chosen, last),) = fake_capture([ids])
                yield index, chosen, last

    def cancel(self) -> None:
        self.cancelled = True


def streamed(conversations: Conversations, servers: Servers, *, window: int = 4) -> StreamedStates:
    return StreamedStates(
        conversations=conversations, stream=servers, cancel=servers.cancel, dtype="bfloat16", window=window
    )


def test_states_come_in_the_order_of_the_steps_and_equal_online_ones(conversations: Conversations) -> None:
    """Whatever order they arrive in; they are rounded to the type of a store. The last documents are not an error."""
    source, online = streamed(conversations, Servers()), OnlineStates(conversations, fake_capture, "bfloat16")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    source.follow(iter(order))
    for row in (order[:3], order[3:4], order[4:29], order[29:]):
        for got, expected in zip(source.states(row), online.states(row), strict=True):
            assert [part.dtype for part in got] == [torch.bfloat16] * 2
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_more_is_requested_than_the_window_holds(conversations: Conversations) -> None:
    """Training that takes nothing stops the requests; each conversation that it takes makes room for one more."""
    servers = Servers()
    source = streamed(conversations, servers)
    source.follow(iter(range(30)))
    taken = 0
    for row in ([], [0], [1, 2, 3, 4, 5], [6]):
        source.states(row)
        taken += len(row)
        until = time.monotonic() + 10
        while len(servers.requested) < taken + 3 and time.monotonic() < until:
            time.sleep(0.01)
        # Requests are made on another thread: time to make too many of them.
        time.sleep(0.05)
        assert taken + 3 <= len(servers.requested) <= taken + 4
    source.close()


def test_a_conversation_of_two_epochs_may_wait_twice(conversations: Conversations) -> None:
    """A window that is longer than an epoch holds it once for each."""
    source = streamed(conversations, Servers(), window=8)
    source.follow([1, 2, 2, 1, 1, 2])
    assert len(source.states([1, 2])) == len(source.states([2, 1])) == len(source.states([1, 2])) == 2


def test_what_has_arrived_is_used_before_a_failure_is_raised(conversations: Conversations) -> None:
    """Training goes as far as it can, so that as little as possible is lost."""
    source = streamed(conversations, Servers(fails_after=6), window=30)
    source.follow(iter(range(30)))
    assert len(source.states(list(range(6)))) == 6
    with pytest.raises(ServerError, match="all servers are gone"):
        source.states([6])


def test_closing_wakes_whoever_waits(conversations: Conversations) -> None:
    """An interrupted launch does not wait for a server that never answers; its retries are given up."""
    servers = Servers()
    source = streamed(conversations, servers)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(source.states, [0])
        source.close()
        assert isinstance(waiting.exception(timeout=10), RuntimeError)
    assert servers.cancelled
