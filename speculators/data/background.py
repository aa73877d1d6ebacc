"""Calls a function on a thread of its own while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Semaphore, Thread
from types import TracebackType
from typing import Any

from speculators.cpu import compute_alone


class BackgroundCalls:
    """Makes the calls in their order, one at a time; a call returns once it is queued.

    When one raises, those after it are dropped, and its error is raised by the next call or at the end of the block.
    When the block itself raises, calls that wait are dropped: it ends as soon as the current one is done.

    Args:
        work: gets the arguments of each call.
        waiting: calls that may wait; a further one blocks, so that memory stays bounded.
    """

    def __init__(self, work: Callable[..., None], *, waiting: int = 8) -> None:
        self._work = work
        self._calls: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._room = Semaphore(waiting)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = Thread(target=self._run, name="background", daemon=True)

    def __call__(self, *arguments: Any) -> None:
        """Queues a call."""
        self._room.acquire()
        self._raise()
        self._calls.put(arguments)

    def _run(self) -> None:
        compute_alone()
        while (arguments := self._calls.get()) is not None:
            # Before the work: `waiting` counts the calls that have not begun.
            self._room.release()
            if not self._dropping:
                try:
                    self._work(*arguments)
                # Whatever it is, the caller's thread has to see it.
                except BaseException as error:
                    self._error, self._dropping = error, True
            # Otherwise the last shard would stay in memory until the next one.
            del arguments

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> BackgroundCalls:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._dropping |= error is not None
        self._calls.put(None)
        self._thread.join()
        if error is None:
            self._raise()
