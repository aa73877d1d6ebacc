"""Shows a run while it works: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from speculators.events import (
    CapturedFacts,
    EvalEvent,
    Event,
    PreparedFacts,
    ProgressEvent,
    RunEvent,
    SaveEvent,
    StageEvent,
    StatesCheckFacts,
    StepEvent,
    SuiteFacts,
    TrainedFacts,
    WarningEvent,
)
from speculators.report.console import console

# Seconds between two plain lines of one stage.
SECONDS_BETWEEN_LINES = 5.0
# The time left is estimated from progress within a window: this share of the time so far, so that a pause changes
# little, but at least this many seconds. Before the window spans the least number of seconds, nothing is estimated.
WINDOW_SHARE = 1 / 2
WINDOW_SECONDS = 10.0
LEAST_SECONDS = 1.0


def duration(seconds: float) -> str:
    """Writes a duration as "12s", "3m 05s" or "2h 04m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m {whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def stage_sentence(event: StageEvent) -> str:
    """Writes what a stage reports as text: its facts, or the detail that it gave, and that logs of older runs hold."""
    facts = event.facts
    parts: list[str] = []
    if isinstance(facts, PreparedFacts):
        parts.append(
            f"{facts.conversations} conversations, {facts.tokens:,} tokens, {facts.supervised:,} of them supervised"
        )
        if facts.skipped:
            largest_first = sorted(facts.skipped.items(), key=lambda item: (-item[1], item[0]))
            parts.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in largest_first))
        if facts.truncated:
            parts.append(f"{facts.truncated} cut at {facts.max_tokens} tokens")
    elif isinstance(facts, CapturedFacts):
        by = f" by {facts.server}" if facts.server else ""
        parts.append(f"{facts.tokens:,} tokens{by}, {facts.bytes / 1e9:.2f} GB in {facts.folder}")
    elif isinstance(facts, TrainedFacts):
        parts += [f"{facts.parameters:,} trainable parameters", _vocabulary(facts), _chosen(facts)]
    elif isinstance(facts, SuiteFacts):
        parts.append(f"{facts.responses} responses to {facts.suite}")
    elif isinstance(facts, StatesCheckFacts):
        parts.append(f"{facts.compared_tokens} tokens of the server match the verifier's own within {facts.error:.1g}")
    return "; ".join([*parts, *([event.detail] if event.detail else [])])


def _vocabulary(facts: TrainedFacts) -> str:
    if facts.draft_vocabulary == facts.vocabulary:
        return f"drafts the whole vocabulary of {facts.vocabulary} tokens"
    share = f"drafts {facts.draft_vocabulary} of {facts.vocabulary} tokens, {facts.coverage:.2%} of the supervised ones"
    rare = f"; end-of-turn tokens {list(facts.rare_ends)} are included although they are rare"
    return share + rare if facts.rare_ends else share


def _chosen(facts: TrainedFacts) -> str:
    if facts.tau is None:
        return f"no suite to choose by: exported the last of {facts.step} updates"
    return f"best at update {facts.step} of {facts.total_steps}, acceptance length {facts.tau:.3f}"


def _has_widgets(out: Console) -> bool:
    """Whether Rich can show a live view in a notebook; without ipywidgets it would only warn, at every refresh."""
    return out.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


class Pace:
    """Estimates a stage's speed from its latest progress; work before the first event does not count."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()
        self._begun = 0.0

    def left(self, now: float, done: float, total: float) -> float | None:
        """Takes in one event and estimates the seconds that are left; None while that is unknown."""
        if self._recent and done < self._recent[-1][1]:
            self._recent.clear()  # another piece of work in the same stage
        if not self._recent:
            self._begun = now
        self._recent.append((now, done))
        window = max(WINDOW_SECONDS, WINDOW_SHARE * (now - self._begun))
        # The newest event that is older than the window stays, because the window begins there.
        while len(self._recent) > 2 and now - self._recent[1][0] > window:
            self._recent.popleft()
        began, before = self._recent[0]
        if now - began < LEAST_SECONDS or done <= before:
            return None
        return (total - done) * (now - began) / (done - before)


class RunView:
    """Renders events as they come; a context manager, so that the live view is removed on any exit.

    Args:
        quiet: show warnings only.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out: Console = console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._stage_name = ""
        self._pace = Pace()
        self._tau = ""

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._take_down()

    def __call__(self, event: Event) -> None:
        """Renders one event."""
        if isinstance(event, WarningEvent):
            self._line(f"[warn]warning:[/] {escape(event.message)}")
        elif self.quiet:
            return
        elif isinstance(event, RunEvent):
            self._line(f"[title]run[/] {escape(str(event.folder))}")
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
            self._line(f"  [note]best so far, kept in {escape(str(event.path))}[/]")

    def _stage(self, event: StageEvent) -> None:
        self._take_down()
        self._begin(event.stage)
        detail = escape(stage_sentence(event))
        if event.status == "start":
            self._line(f"[title]{event.stage}[/] {detail}".rstrip())
        elif event.status == "skip":
            self._line(f"[title]{event.stage}[/] [good]already done:[/] {detail}")
        else:
            self._line(f"[title]{event.stage}[/] [good]done[/] in {duration(event.seconds)}: {detail}".rstrip(": "))

    def _begin(self, stage: str) -> None:
        self._stage_name, self._pace = stage, Pace()

    def _progress(self, event: ProgressEvent) -> None:
        if event.stage != self._stage_name:
            self._begin(event.stage)
        total = event.total
        left = self._pace.left(time.monotonic(), event.done, total) if total else None
        of_total = f" of {total:,.0f}" if total and event.unit != "%" else ""
        unit = "%" if event.unit == "%" else f" {event.unit}".rstrip()
        amount = f"{event.done:,.0f}{of_total}{unit}"
        self._show(event, amount, [event.note], "" if left is None else f"{duration(left)} left")

    def _step(self, event: StepEvent) -> None:
        accuracy = " ".join(
            f"{value:.2f}" for name, value in sorted(event.metrics.items()) if name.startswith("accuracy_")
        )
        # A narrow terminal cuts off the last of these first.
        rest = [
            f"loss {event.loss:.3f}",
            self._tau,
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"accuracy {accuracy}" if accuracy else "",
        ]
        amount = f"epoch {event.epoch + 1}, update {event.step:,} of {event.total_steps:,}"
        place = ProgressEvent(stage="train", done=event.step, total=event.total_steps)
        self._show(place, amount, rest, f"{duration(event.seconds_left)} left")

    def _show(self, place: ProgressEvent, amount: str, rest: Sequence[str], left: str) -> None:
        """Shows how far a stage has come: two lines beside the bar on a terminal, elsewhere one line now and then."""
        if self.out.is_terminal or _has_widgets(self.out):
            lines = ["  ".join(filter(None, parts)) for parts in ((amount, left), rest)]
            bar, task = self._live(place.stage)
            text = escape("\n".join(filter(None, lines)))
            bar.update(task, completed=place.done, total=place.total, stage=place.stage, text=text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(f"  {place.stage}: {escape('  '.join(filter(None, (amount, *rest, left))))}")

    def _live(self, stage: str) -> tuple[Progress, TaskID]:
        """Opens the live view, unless it is open."""
        if self._bar is None or self._task is None:
            columns = (
                TextColumn("  {task.fields[stage]}"),
                BarColumn(16),
                # Takes the space that the others leave, so that a narrow terminal cuts off its end, and none of them.
                TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self.out, transient=True, expand=True)
            self._task = self._bar.add_task("", total=None, stage=stage, text="")
            self._bar.start()
        return self._bar, self._task

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.out.print(text, soft_wrap=True)

    def _take_down(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
