"""Ctrl-C and a scheduler's SIGTERM as a request to stop between two updates."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A terminal's Ctrl-C reaches a worker twice within moments: from the terminal and from torchrun.
ECHO_SECONDS = 1.0


class StopRequest:
    """While it is entered, a first signal only sets `asked`; one after `ECHO_SECONDS` interrupts at once.

    An exception in the middle of an update would leave some parameters updated and others not, and nothing worth
    saving. Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Returns whether somebody wants the run to stop."""
        return self._asked_at is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > ECHO_SECONDS:
            raise KeyboardInterrupt
