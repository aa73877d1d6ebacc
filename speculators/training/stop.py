"""Turns Ctrl-C and a scheduler's SIGTERM into a request to stop between two updates."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# One Ctrl-C reaches a worker twice within moments: from the terminal and from torchrun.
ECHO_SECONDS = 1.0


class StopRequest:
    """While entered, the first signal only sets `requested`; another one after `ECHO_SECONDS` interrupts at once.

    An exception in the middle of an update would leave some parameters updated and others not, and nothing worth
    saving. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should stop after the current update."""
        return self._requested_at is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif now - self._requested_at > ECHO_SECONDS:
            raise KeyboardInterrupt
