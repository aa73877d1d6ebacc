"""States that arrive while training runs: requested in the order of its steps, within a window, and used once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Condition, Thread

import attrs
import torch

from speculators.cpu import compute_alone
from speculators.data.batches import States, StateSource
from speculators.data.capture import Stream, token_row
from speculators.data.encoded import Conversations
from speculators.data.state_types import from_stored, to_stored

# Conversations that may be requested or wait, for each request at once: one answered, and one in flight.
WINDOW = 2


@attrs.define(eq=False, kw_only=True)
class StreamedStates(StateSource):
    """Requests the states of the next steps on a thread of its own and hands them out as they are needed.

    When training is slower than the servers, the window is full and they get no further requests. What has arrived is
    used before a failure is raised.

    Attributes:
        conversations: their tokens are requested.
        stream: the servers, by any transport.
        cancel: makes the stream give up retries that are pending.
        dtype: name of the type that a store would have, so that training sees the same values as from one.
        window: conversations that may be requested or wait.
    """

    conversations: Conversations
    stream: Stream
    cancel: Callable[[], None]
    dtype: str
    window: int
    _arrived: dict[int, list[States]] = attrs.field(init=False, factory=dict)
    _out: int = attrs.field(init=False, default=0)
    _failure: BaseException | None = attrs.field(init=False, default=None)
    _changed: Condition = attrs.field(init=False, factory=Condition)

    def follow(self, documents: Iterable[int]) -> None:
        """Starts to request conversations, which `states` must be asked for in this order."""
        # A daemon: one that waits for a server must not keep a failed process alive.
        Thread(target=self._receive, args=(documents,), name="streamed", daemon=True).start()

    def states(self, indices: list[int]) -> list[States]:
        """Waits for hidden_states [n, A*H] and last [n, H] of each conversation; raises the stream's failure."""
        return [self._take(index) for index in indices]

    def close(self) -> None:
        """Ends all requests; whoever waits for states gets an error."""
        self._fail(RuntimeError("closed while states were awaited"))
        self.cancel()

    def _take(self, index: int) -> States:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived.get(index) or self._failure)
            if not self._arrived.get(index):
                assert self._failure is not None
                raise self._failure
            # A conversation waits twice where the window reaches into the next epoch: both have the same states.
            states = self._arrived[index].pop()
            self._out -= 1
            self._changed.notify_all()
            return states

    def _receive(self, documents: Iterable[int]) -> None:
        compute_alone()
        try:
            for index, chosen, last in self.stream(self._requests(documents)):
                states = from_stored(to_stored(chosen, last, self.dtype), chosen.device)
                with self._changed:
                    self._arrived.setdefault(index, []).append(states)
                    self._changed.notify_all()
        # Whatever it is, the thread that needs the states has to see it.
        except BaseException as error:
            self._fail(error)

    def _requests(self, documents: Iterable[int]) -> Iterator[tuple[int, torch.Tensor]]:
        for index in documents:
            with self._changed:
                self._changed.wait_for(lambda: self._out < self.window or self._failure)
                if self._failure is not None:
                    return
                self._out += 1
            yield index, token_row(self.conversations, index)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
