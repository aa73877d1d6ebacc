"""Builds the next step's rows while the current one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import attrs
import torch

from speculators.cpu import compute_alone
from speculators.data.batches import Row

Step = tuple[int, int]


@attrs.define(eq=False)
class Prefetcher:
    """Calls `make` one step ahead on a background thread; it is called like `make` itself.

    A wrong guess of the next step costs time but never correctness: rows that were not built ahead are built on demand.
    An exception in `make` is raised by the call that needs its rows.

    Attributes:
        make: builds the rows of (epoch, step).
        following: gives the next step; None after the last.
        device: of this process. On a GPU the rows are put into pinned memory, for copies that overlap computation.
    """

    make: Callable[[int, int], list[Row]]
    following: Callable[[int, int], Step | None]
    device: torch.device
    _thread: ThreadPoolExecutor = attrs.field(init=False)
    _ahead: dict[Step, Future[list[Row]]] = attrs.field(init=False, factory=dict)

    @_thread.default
    def _start(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "prefetch", initializer=_enter, initargs=(self.device,))

    def __call__(self, epoch: int, step: int) -> list[Row]:
        """Returns the rows of a step and starts to build those of the next."""
        rows_ahead = self._ahead.pop((epoch, step), None) or self._thread.submit(self._build, epoch, step)
        for guess in self._ahead.values():
            guess.cancel()
        self._ahead.clear()
        after = self.following(epoch, step)
        rows = rows_ahead.result()
        if after is not None:
            self._ahead[after] = self._thread.submit(self._build, *after)
        return rows

    def _build(self, epoch: int, step: int) -> list[Row]:
        rows = self.make(epoch, step)
        if self.device.type != "cuda":
            return rows
        return [{name: _pinned(tensor) for name, tensor in row.items()} for row in rows]

    def close(self) -> None:
        """Ends the thread and drops its unfinished work."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _enter(device: torch.device) -> None:
    """Prepares a thread that works beside a forward under autocast."""
    # All threads share autocast's cache of cast weights, and whoever leaves the outermost autocast block of his thread
    # empties it: the forward would cast its weights again, and sum their gradients otherwise. A verifier's rotary
    # embedding has such a block. This thread is inside of one from the start, so no block is its outermost.
    torch.autocast_increment_nesting()
    compute_alone()
    if device.type == "cuda":
        # A new thread's device is GPU 0, whatever this process's is.
        torch.cuda.set_device(device)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    # States that were computed online on a GPU are already where they are needed.
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
