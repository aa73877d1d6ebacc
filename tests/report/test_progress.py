"""The progress display of a run, and the definitions under its tables."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import re
import sys
import types

import made_results
import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.events import EvalEvent, Pieces, ProgressEvent, StageEvent, StepEvent, WarningEvent
from speculators.report import progress
from speculators.report.bench import definitions
from speculators.report.console import STYLES
from speculators.report.progress import Pace, RunView, duration


@pytest.fixture
def view() -> RunView:
    """A view that writes plain text of 200 columns into memory."""
    made = RunView()
    made.out = Console(file=io.StringIO(), theme=Theme(STYLES), highlight=False, width=200)
    return made


def said(view: RunView) -> str:
    return view.out.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (185, "3m 05s"), (7440, "2h 04m")])
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    """They are rounded to seconds, minutes or hours."""
    assert duration(seconds) == text


def test_the_time_left_goes_by_the_events_alone() -> None:
    """A late first event (a model was loaded, a file converted) does not count towards the rate."""
    pace = Pace()
    assert pace.left(1000.0, 10, 100) is None
    assert pace.left(1000.5, 15, 100) is None  # half a second says nothing yet
    assert pace.left(1002.0, 30, 100) == pytest.approx(7.0)


def test_the_time_left_follows_the_latest_half() -> None:
    """The estimate forgets a slow beginning."""
    pace = Pace()
    for second in range(60):
        pace.left(float(second), second, 1000)
    for second in range(60, 120):
        left = pace.left(float(second), 60 + 10 * (second - 59), 1000)
    assert left == pytest.approx((1000 - 660) / 10, rel=0.02)


def test_a_pause_adds_less_than_half_to_the_time_left() -> None:
    """Progress comes in lumps, such as batches of answers; ten seconds with one step do not make hours of it."""
    pace = Pace()
    for second in range(100):
        pace.left(float(second), second, 1000)
    left = pace.left(115.0, 100, 1000)
    assert left is not None
    assert 900 < left < 1.5 * 900


def test_work_that_begins_anew_has_a_rate_of_its_own() -> None:
    """A stage may do several pieces of work in turn, and one that stands still gets no estimate."""
    pace = Pace()
    pace.left(0.0, 0, 10)
    assert pace.left(10.0, 10, 10) == 0
    assert pace.left(11.0, 0, 10) is None
    assert pace.left(13.0, 4, 10) == pytest.approx(3.0)
    assert Pace().left(0.0, 0, 10) is None


def test_brackets_in_messages_are_text(view: RunView) -> None:
    """`[data]` is a section of a recipe, not a style of the console, and long lines are not broken."""
    view(WarningEvent(message="[data] has " + "x" * 300 + " [/] end"))
    view(StageEvent(stage="prepare", status="done", detail="in /tmp/[a]/b", seconds=2))
    lines = said(view).splitlines()
    assert lines[0] == "warning: [data] has " + "x" * 300 + " [/] end"
    assert lines[1] == "prepare done in 2s: in /tmp/[a]/b"


def test_a_stage_without_words_ends_without_a_colon(view: RunView) -> None:
    """Neither its start nor its end has a colon with nothing behind it."""
    view(StageEvent(stage="bench", status="start"))
    view(StageEvent(stage="bench", status="done", seconds=1))
    assert said(view) == "bench\nbench done in 1s\n"


def test_quiet_shows_warnings_only(view: RunView) -> None:
    """Warnings affect the result, so they are shown even then."""
    view.quiet = True
    view(StageEvent(stage="bench", status="start"))
    view(WarningEvent(message="careful"))
    assert said(view) == "warning: careful\n"


def test_piped_progress_is_a_line_every_few_seconds(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line has amount, unit, note and time left; a line of training has loss, speed and accuracy."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    view(StageEvent(stage="capture", status="start"))
    for done in range(13):
        view(ProgressEvent(stage="capture", done=1000 * done, total=20_000, unit="tokens", note="900 tokens/s"))
        now[0] += 1
    assert said(view).splitlines()[1:] == [
        "  capture: 5,000 of 20,000 tokens  900 tokens/s  15s left",
        "  capture: 10,000 of 20,000 tokens  900 tokens/s  10s left",
    ]
    values = {"epoch": 0, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 9, "seconds_left": 61.0}
    now[0] += 10
    view(StepEvent(step=3, total_steps=9, tokens_per_second=1234.0, metrics={"accuracy_1": 0.5}, **values))
    line = said(view).splitlines()[-1]
    assert line == "  train: epoch 1, update 3 of 9  loss 2.500  1,234 tokens/s  accuracy 0.50  1m 01s left"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_live_view_is_complete_at_any_width(width: int) -> None:
    """Stage, progress, loss, tau so far, rate and time left are shown in full, even at 80 columns."""
    view = RunView()
    screen = io.StringIO()
    view.out = Console(file=screen, theme=Theme(STYLES), highlight=False, width=width, force_terminal=True)
    with view:
        view(StageEvent(stage="train", status="start"))
        view(EvalEvent(step=20_000, tau=2.345, metrics={"accept_1": 0.6}))
        rate = {"tokens": 65_536, "tokens_per_second": 123_456.0, "seconds_left": 10_000.0}
        accuracy = {f"accuracy_{place}": 0.5 for place in range(1, 8)}
        values = {"epoch": 34, "loss": 3.25, "learning_rate": 1e-3, "grad_norm": 1.0, "metrics": accuracy}
        view(StepEvent(step=20_208, total_steps=30_000, **values, **rate))
        view._bar.refresh()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for phrase in ("  train ", "epoch 35, update 20,208 of 30,000", "2h 46m left"):
        assert phrase in shown
    for phrase in ("loss 3.250", "tau 2.345", "123,456 tokens/s"):
        assert phrase in shown
    assert max(map(len, re.split(r"[\r\n]", shown))) <= width


def test_settings_that_differ_in_k_share_their_definition() -> None:
    """Each temperature has one line, which lists every K."""
    settings = [
        made_results.setting(num_speculative_tokens=k, definition=f"tau = ..; K={k}, T={t}; a chain")
        for t in (0, 1)
        for k in (1, 3)
    ]
    assert definitions(settings) == "tau = ..; K=1, 3, T=0; a chain\ntau = ..; K=1, 3, T=1; a chain"


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_a_bar_if_it_has_widgets(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich draws its live view into an ipywidgets output; without that package a notebook gets plain lines."""
    shown: list[object] = []

    class Output(contextlib.nullcontext):  # type: ignore[type-arg]
        def clear_output(self, wait: bool = False) -> None:
            pass

        def close(self) -> None:
            shown.append("closed")

    display = types.ModuleType("IPython.display")
    display.display = lambda *items, **_: shown.extend(items)
    widget_module = types.ModuleType("ipywidgets")
    widget_module.Output = Output
    widget_module.__spec__ = importlib.machinery.ModuleSpec("ipywidgets", None)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    if widgets:
        monkeypatch.setitem(sys.modules, "ipywidgets", widget_module)
    view = RunView()
    view.out = Console(force_jupyter=True, theme=Theme(STYLES), highlight=False, width=100)
    with view:
        view(StageEvent(stage="capture", status="start"))
        view(ProgressEvent(stage="capture", done=5, total=10, unit="tokens"))
        assert (view._bar is not None) == widgets
    assert any(isinstance(item, Output) for item in shown) == widgets
    # The bar is taken down when the view ends.
    assert ("closed" in shown) == widgets


def test_the_pieces_of_a_stage_share_one_bar_whose_total_holds() -> None:
    """Answers, their capture, replay and live decode are one share of the whole, which never falls back."""
    events: list[ProgressEvent] = []
    pieces = Pieces(stage="bench", pieces=2, listen=events.append)
    answers, replay = pieces.piece(phases=2), pieces.piece()
    for done in (1, 2):
        answers(ProgressEvent(stage="regenerate", done=done, total=2, unit="prompts"))
    for done in (1, 4):
        answers(ProgressEvent(stage="capture", done=done, total=4, unit="responses", note="K=3"))
    for _ in range(2):  # once for each K
        replay(ProgressEvent(stage="replay", done=1, total=1, unit="responses"))
    assert {(event.stage, event.total, event.unit) for event in events} == {("bench", 100, "%")}
    assert [event.done for event in events] == [12.5, 25, 31.25, 50, 100, 100]
    assert events[3].note == "capture: 4 of 4 responses K=3"


def test_a_piece_that_takes_longer_counts_for_more() -> None:
    """The bar of a stage does not stand at half while nearly all of the work is done."""
    events: list[ProgressEvent] = []
    pieces = Pieces(stage="prepare", pieces=5, listen=events.append)
    for piece, stage in ((pieces.piece(weight=4), "regenerate"), (pieces.piece(), "prepare")):
        for done in (1, 2):
            piece(ProgressEvent(stage=stage, done=done, total=2, unit="prompts"))
    assert [event.done for event in events] == [40, 80, 90, 100]
