"""Captures hidden states through several servers: shared work, another server after a failure, a circuit breaker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock

import attrs
import torch

from speculators.errors import ServerError
from speculators.servers.endpoint import in_flight
from speculators.servers.states_client import StatesClient

# A server that failed so often in a row gets no more requests, except one after each pause.
FAILURES, PAUSE_SECONDS = 3, 30.0


@attrs.define(eq=False)
class _Server:
    """One server of a pool.

    Attributes:
        open_requests: requests that it has not answered yet.
        turn: number of the latest request, among those of the pool.
        failures: in a row.
        paused_until: by `time.monotonic`.
    """

    client: StatesClient
    open_requests: int = 0
    turn: int = 0
    failures: int = 0
    paused_until: float = 0.0


@attrs.define(eq=False, kw_only=True)
class StatesPool:
    """Captures like `Engine.capture`, through servers that share the work. Threads may share it.

    A sequence goes to the server with the fewest open requests, in turn where several have as few. After a failure that
    may pass it goes to another server at once; when all have failed, to all of them again after a delay.

    Attributes:
        clients: one for each server, whose endpoints have the same `retry` and the same `stop`.
        name: names a sequence by its index, for messages.
        report: gets a sentence when a server is left out, and when it is back; called from any thread.
    """

    clients: Sequence[StatesClient]
    name: Callable[[int], str] = str
    report: Callable[[str], None] = lambda _: None
    _servers: list[_Server] = attrs.field(init=False)
    _turns: int = attrs.field(init=False, default=0)
    _lock: Lock = attrs.field(init=False, factory=Lock)

    @_servers.default
    def _rested(self) -> list[_Server]:
        return [_Server(client) for client in self.clients]

    def capture_all(
        self, rows: Iterable[tuple[int, torch.Tensor]], *, concurrency: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Captures many sequences, several at once.

        Args:
            rows: (index, token ids [n] int64), consumed lazily.
            concurrency: requests at once, at all servers together.

        Yields:
            (index, chosen states [n, A*H], last states [n, H]), as they arrive.

        Raises:
            ServerError: a request failed for good; sequences finished before are yielded first.
        """
        work = in_flight(self._named, rows, concurrency=concurrency, stop=self.clients[0].endpoint.stop)
        try:
            for (index, _), (chosen, last) in work:
                yield index, chosen, last
        finally:
            for client in self.clients:
                client.remove_late()

    def cancel(self) -> None:
        """Makes all requests give up their pending retries; no more can be captured afterwards."""
        self.clients[0].endpoint.stop.set()

    def _named(self, row: tuple[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        index, ids = row
        try:
            return self.capture(ids)
        except ServerError as error:
            message = f"conversation {self.name(index)}: {error.message}"
            raise ServerError(message, hint=error.hint, status=error.status) from error.__cause__

    def capture(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Captures one sequence.

        Args:
            ids: token ids [n].

        Returns:
            The chosen states [n, A*H] in the order of the layer ids, and the last layer's [n, H].

        Raises:
            ServerError: every server failed more often than their `retry` allows; or one of them returned states that
                are not finite, or do not match the request.
        """
        return self.clients[0].endpoint.patiently(lambda: self._round(ids))

    def _round(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Requests a sequence from one server after the other until one gives it."""
        untried = list(self._servers)
        while True:
            server = self._choose(untried)
            untried.remove(server)
            try:
                states = server.client.attempt(ids)
            except ServerError as error:
                self._note_failure(server, error)
                if not (error.passes and untried):
                    raise
            else:
                self._note_success(server)
                return states

    def _choose(self, servers: Sequence[_Server]) -> _Server:
        with self._lock:
            now = time.monotonic()
            server = min(servers, key=lambda each: (each.paused_until > now, each.open_requests, each.turn))
            if server.failures >= FAILURES:
                # This request tries it again; the others do not until its answer is known.
                server.paused_until = now + PAUSE_SECONDS
            self._turns += 1
            server.turn, server.open_requests = self._turns, server.open_requests + 1
            return server

    def _note_failure(self, server: _Server, error: ServerError) -> None:
        with self._lock:
            server.open_requests -= 1
            server.failures += error.passes
            leave_out = server.failures == FAILURES and error.passes and len(self._servers) > 1
            if leave_out:
                server.paused_until = time.monotonic() + PAUSE_SECONDS
        if leave_out:
            again = f"this server is left out after {FAILURES} failures in a row, and tried every {PAUSE_SECONDS:g} s"
            self.report(f"{error.message}: {again}")

    def _note_success(self, server: _Server) -> None:
        with self._lock:
            server.open_requests -= 1
            was_left_out = server.failures >= FAILURES and len(self._servers) > 1
            server.failures, server.paused_until = 0, 0.0
        if was_left_out:
            self.report(f"{server.client.endpoint.url}: answers again")
