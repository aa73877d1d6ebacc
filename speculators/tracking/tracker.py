"""Passes events on, and their numbers to sinks, each on a daemon thread behind a bounded queue: no one waits for it."""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import textwrap
import threading
import time
from collections.abc import Callable, Mapping

import attrs

from speculators.bench.result import BenchResult
from speculators.events import EvalEvent, Event, StepEvent, WarningEvent
from speculators.recipe.expect import setting_key
from speculators.tracking.sinks import Sink, TrackedRun

ROOM = 1000
CLOSE_SECONDS = 10.0
# Characters of a library's error message.
LONGEST = 300


def numbers_of(event: Event) -> tuple[int, dict[str, float]] | None:
    """Extracts the update and the numbers of an event for a sink; None for events without numbers."""
    if isinstance(event, StepEvent):
        own = {f"train/{name}": value for name, value in event.metrics.items()}
        numbers = {"loss": event.loss, "learning_rate": event.learning_rate, "grad_norm": event.grad_norm}
        numbers |= {"tokens_per_second": event.tokens_per_second, "epoch": float(event.epoch)}
        return event.step, {f"train/{name}": value for name, value in numbers.items()} | own
    if isinstance(event, EvalEvent):
        return event.step, {"eval/tau": event.tau, **{f"eval/{name}": value for name, value in event.metrics.items()}}
    return None


def numbers_of_bench(result: BenchResult) -> dict[str, float]:
    """Names tau and speed-up of every setting of a benchmark for a sink; a tau of nothing (NaN) is left out."""
    numbers = {}
    for setting in result.settings:
        place = f"bench/{setting_key(*setting.key)}"
        numbers[f"{place}/tau"] = setting.exact.tau
        if setting.live:
            numbers[f"{place}/speed_up"] = setting.live.speed.speed_up
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


class SinkThread:
    """Runs one sink on its thread. A failure there is kept in `trouble`, for the main thread to report.

    Args:
        name: of the sink, for messages.
        open_sink: opens it; called on the thread at the first numbers, because it may use the network.
        room: how many updates can wait in the queue; while it is full, numbers are dropped.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], *, room: int) -> None:
        self.name, self.trouble = name, ""
        self._open = open_sink
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(room)
        self._finished = False
        # A daemon thread, so that a sink that hangs cannot keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Queues numbers without waiting; drops them if the queue is full."""
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._waiting.put_nowait((step, numbers))
        except queue.Full:
            self.trouble = self.trouble or f"{self.name} cannot keep up: it misses numbers from update {step} on"

    def ask_to_close(self, *, finished: bool) -> None:
        """Makes the thread end once it has written what waits in the queue."""
        self._finished = finished
        # None is the end mark. If the queue is full, the oldest numbers make room for it.
        while True:
            try:
                return self._waiting.put_nowait(None)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def join(self, seconds: float) -> None:
        """Waits at most this long for the thread to end, if it was started."""
        if self._thread.ident is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.trouble = self.trouble or f"{self.name} does not respond: it may miss the last numbers"

    def _work(self) -> None:
        try:
            sink = self._open()
            while (item := self._waiting.get()) is not None:
                sink.write(*item)
            sink.close(finished=self._finished)
        # Somebody else's library, network and server: whatever they raise, the run goes on. BaseException, because one
        # library raises KeyboardInterrupt when its prompt gets no answer, and others exit.
        except BaseException as error:
            reason = textwrap.shorten(str(error), LONGEST, placeholder=" ..")
            self.trouble = f"{self.name} failed and receives nothing more: {type(error).__name__}: {reason}"


@attrs.define(eq=False)
class Tracker:
    """Passes every event on to a listener, and its numbers to the sinks, if there are any.

    Attributes:
        then: gets every event, and one WarningEvent for each sink that fails.
        sinks: by name, what opens a sink for a run.
        room: how many updates can wait for a slow sink.
        patience: seconds that `close` waits for all sinks together.
    """

    then: Callable[[Event], None]
    sinks: Mapping[str, Callable[[TrackedRun], Sink]]
    room: int = ROOM
    patience: float = CLOSE_SECONDS
    _threads: list[SinkThread] = attrs.field(init=False, factory=list)
    _reported: set[str] = attrs.field(init=False, factory=set)

    def open(self, subject: TrackedRun) -> None:
        """Sets the run; each sink is opened at its first numbers."""
        self._threads = [
            SinkThread(name, functools.partial(make, subject), room=self.room) for name, make in self.sinks.items()
        ]

    def __call__(self, event: Event) -> None:
        """Handles one event."""
        self.then(event)
        if numbers := numbers_of(event):
            self._put(*numbers)

    def bench(self, result: BenchResult, *, step: int) -> None:
        """Sends the numbers of a benchmark of the speculator after `step` updates."""
        self._put(step, numbers_of_bench(result))

    def close(self, *, finished: bool) -> None:
        """Ends the sinks, waiting at most `patience` seconds, and reports those that are not done."""
        for thread in self._threads:
            thread.ask_to_close(finished=finished)
        end = time.monotonic() + self.patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._report()

    def _put(self, step: int, numbers: Mapping[str, float]) -> None:
        for thread in self._threads:
            thread.put(step, numbers)
        self._report()

    def _report(self) -> None:
        for thread in self._threads:
            if thread.trouble and thread.name not in self._reported:
                self._reported.add(thread.name)
                self.then(
                    WarningEvent(message=f"{thread.trouble}; the run continues, and events.jsonl has all of them")
                )
