"""Passes events on and numbers to sinks, each on a daemon thread behind a bounded queue: nothing ever waits for one."""

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
# Characters of what a library says.
LONGEST = 300


def numbers_of(event: Event) -> tuple[int, dict[str, float]] | None:
    """Returns the update and the numbers that a sink gets of an event; None for events without."""
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
    """One sink on its thread. What goes wrong there ends up in `trouble`, for the main thread to tell.

    Args:
        name: of the sink, for messages.
        open_sink: makes it; called on the thread, when there is something to write: it may ask the network.
        room: numbers of so many updates wait before new ones are dropped.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], *, room: int) -> None:
        self.name, self.trouble = name, ""
        self._open = open_sink
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(room)
        self._finished = False
        # A daemon: a sink that hangs cannot keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hands numbers over without waiting; where there is no room, they are dropped."""
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._waiting.put_nowait((step, numbers))
        except queue.Full:
            self.trouble = self.trouble or f"{self.name} does not keep up: from update {step} on it lacks numbers"

    def ask_to_close(self, *, finished: bool) -> None:
        """Lets the thread end once it has handed over what waits."""
        self._finished = finished
        while True:
            try:
                return self._waiting.put_nowait(None)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def join(self, seconds: float) -> None:
        """Waits so long for the end of the thread, if it was started."""
        if self._thread.ident is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.trouble = self.trouble or f"{self.name} does not answer: it may lack the last numbers"

    def _work(self) -> None:
        try:
            sink = self._open()
            while (item := self._waiting.get()) is not None:
                sink.write(*item)
            sink.close(finished=self._finished)
        # Somebody else's library, network and server: whatever they raise, the run goes on. One answers a question that
        # nobody answered with KeyboardInterrupt, others exit.
        except BaseException as error:
            words = textwrap.shorten(str(error), LONGEST, placeholder=" ..")
            self.trouble = f"{self.name} failed and gets nothing more: {type(error).__name__}: {words}"


@attrs.define(eq=False)
class Tracker:
    """A listener that passes every event on and gives sinks their numbers; without sinks it does just the former.

    Attributes:
        then: gets every event, and a WarningEvent, once, for a sink in trouble.
        sinks: makes each sink for a run, by name.
        room: numbers of so many updates wait for a slow sink before new ones are dropped.
        patience: seconds that `close` waits for all sinks together.
    """

    then: Callable[[Event], None]
    sinks: Mapping[str, Callable[[TrackedRun], Sink]]
    room: int = ROOM
    patience: float = CLOSE_SECONDS
    _feeds: list[SinkThread] = attrs.field(init=False, factory=list)
    _told: set[str] = attrs.field(init=False, factory=set)

    def open(self, subject: TrackedRun) -> None:
        """Names the run; a sink is opened when it gets its first numbers."""
        self._feeds = [
            SinkThread(name, functools.partial(make, subject), room=self.room) for name, make in self.sinks.items()
        ]

    def __call__(self, event: Event) -> None:
        """Takes in one event."""
        self.then(event)
        if found := numbers_of(event):
            self._put(*found)

    def bench(self, result: BenchResult, *, step: int) -> None:
        """Takes in a benchmark of the speculator after `step` updates."""
        self._put(step, numbers_of_bench(result))

    def close(self, *, finished: bool) -> None:
        """Ends the sinks; waits a little for them, and tells which are not done."""
        for feed in self._feeds:
            feed.ask_to_close(finished=finished)
        end = time.monotonic() + self.patience
        for feed in self._feeds:
            feed.join(max(0.0, end - time.monotonic()))
        self._tell()

    def _put(self, step: int, numbers: Mapping[str, float]) -> None:
        for feed in self._feeds:
            feed.put(step, numbers)
        self._tell()

    def _tell(self) -> None:
        for feed in self._feeds:
            if feed.trouble and feed.name not in self._told:
                self._told.add(feed.name)
                self.then(WarningEvent(message=f"{feed.trouble}; the run goes on, and events.jsonl has all of them"))
