"""What a run tells while it works: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from speculators.events import (
    EvalEvent,
    Event,
    ProgressEvent,
    SaveEvent,
    StageEvent,
    StepEvent,
    WarningEvent,
)
from speculators.report.console import console

# Between two plain lines of one stage.
SECONDS_BETWEEN_LINES = 5.0


def duration(seconds: float) -> str:
    """Returns "12s", "3m 05s" or "2h 04m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m {whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class RunView:
    """Renders events as they come; used as a context so that the live view is taken down on any exit.

    Args:
        quiet: show warnings only.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out: Console = console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._last_stage = ""
        self._began = 0.0
        self._tau = ""

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._take_down()

    def __call__(self, event: Event) -> None:
        """Renders one event."""
        if isinstance(event, WarningEvent):
            self._line(f"[warn]warning:[/] {event.message}")
        elif self.quiet:
            return
        elif isinstance(event, StageEvent):
            self._stage(event)
        elif isinstance(event, ProgressEvent):
            self._progress(event)
        elif isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, EvalEvent):
            self._tau = f"tau {event.tau:.3f}"
            rates = " ".join(f"{value:.2f}" for name, value in event.metrics.items() if name.startswith("accept"))
            self._line(
                f"  update {event.step}: acceptance length [number]{event.tau:.3f}[/] exact; by position {rates}"
            )
        elif isinstance(event, SaveEvent) and event.best:
            self._line(f"  [note]best so far, kept in {event.path}[/]")

    def _stage(self, event: StageEvent) -> None:
        if event.status == "start":
            self._last_stage = event.stage
            self._line(f"[title]{event.stage}[/] {event.detail}".rstrip())
        elif event.status == "skip":
            self._line(f"[title]{event.stage}[/] [good]already done:[/] {event.detail}")
        else:
            self._take_down()
            self._line(f"[title]{event.stage}[/] [good]done[/] in {duration(event.seconds)}: {event.detail}")

    def _progress(self, event: ProgressEvent) -> None:
        total = event.total
        if event.stage != self._last_stage or event.done <= 0:
            self._began = time.monotonic()
            self._last_stage = event.stage
        left = ""
        spent = time.monotonic() - self._began
        if total and event.done > 0 and spent > 1:
            left = f"{duration(spent * (total - event.done) / event.done)} left"
        amount = (
            f"{event.done:,.0f}" + (f" of {total:,.0f}" if total else "") + (f" {event.unit}" if event.unit else "")
        )
        self._show(event.stage, event.done, total, "  ".join(part for part in (amount, event.note, left) if part))

    def _step(self, event: StepEvent) -> None:
        accuracy = " ".join(
            f"{value:.2f}" for name, value in sorted(event.metrics.items()) if name.startswith("accuracy_")
        )
        parts = [
            f"epoch {event.epoch + 1}, update {event.step} of {event.total_steps}",
            f"loss {event.loss:.3f}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"right {accuracy}" if accuracy else "",
            self._tau,
            f"{duration(event.seconds_left)} left",
        ]
        self._show("train", event.step, event.total_steps, "  ".join(part for part in parts if part))

    def _show(self, stage: str, done: float, total: float | None, text: str) -> None:
        if self.out.is_terminal:
            if self._bar is None:
                columns = (TextColumn("  {task.fields[stage]}"), BarColumn(24), TextColumn("{task.fields[text]}"))
                self._bar = Progress(*columns, TimeElapsedColumn(), console=self.out, transient=True)
                self._bar.start()
                self._task = self._bar.add_task("", total=total, stage=stage, text=text)
            assert self._task is not None
            self._bar.update(self._task, completed=done, total=total, stage=stage, text=text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(f"  {stage}: {text}")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.out.print(text)

    def _take_down(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
