"""Sinks get every number, and whatever they do, nothing waits for them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import made_results
import pytest

from speculators.errors import RecipeError
from speculators.events import EvalEvent, Event, StageEvent, StepEvent, WarningEvent
from speculators.recipe.load import load_recipe
from speculators.recipe.tracking import SINKS
from speculators.tracking import sinks
from speculators.tracking.sinks import OPEN, Sink, TrackedRun, check_installed
from speculators.tracking.tracker import Tracker, numbers_of_bench


class Kept:
    """A sink that records what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.finished: bool | None = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.rows.append((step, numbers))

    def close(self, *, finished: bool) -> None:
        self.finished = finished


class Stuck(Kept):
    """A sink that hangs at its first number until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.go.wait(30)
        super().write(step, numbers)


def step(number: int) -> StepEvent:
    values = {"epoch": 0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 9, "tokens_per_second": 5.0}
    return StepEvent(
        step=number, total_steps=9, loss=1 / number, seconds_left=1.0, metrics={"accuracy_1": 0.5}, **values
    )


BENCH = made_results.bench_result(
    made_results.setting(suite="talk", exact=made_results.acceptance(1.75)),
    made_results.setting(
        suite="talk",
        num_speculative_tokens=5,
        temperature=1.0,
        exact=made_results.acceptance(math.nan),
        live=None,
    ),
)


@pytest.fixture
def subject(tmp_path: Path) -> TrackedRun:
    return TrackedRun(name="smoke-1234", folder=tmp_path, values={"seed": 0, "data.sources[0].path": "x.jsonl"})


def tracker(
    subject: TrackedRun, made: Sink | Callable[[TrackedRun], Sink], **limits: float
) -> tuple[Tracker, list[Event]]:
    """Makes a tracker with one sink, and the list of events that it passes on."""
    events_passed: list[Event] = []
    make = made if callable(made) else lambda _: made
    tracking = Tracker(then=events_passed.append, sinks={"kept": make}, **limits)
    tracking.open(subject)
    return tracking, events_passed


def warnings(events_passed: list[Event]) -> list[str]:
    return [event.message for event in events_passed if isinstance(event, WarningEvent)]


def test_a_sink_gets_updates_evaluations_and_the_benchmark(subject: TrackedRun) -> None:
    """A sink gets numbers by name and update, and learns that the run finished; events pass on unchanged."""
    sink = Kept()
    tracking, events_passed = tracker(subject, sink)
    events = [StageEvent(stage="train", status="start"), step(1), EvalEvent(step=1, tau=1.5, metrics={"accept_1": 0.4})]
    for event in events:
        tracking(event)
    tracking.bench(BENCH, step=1)
    tracking.close(finished=True)
    assert events_passed == events
    assert [number for number, _ in sink.rows] == [1, 1, 1]
    assert sink.rows[0][1] == {
        "train/loss": 1.0,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 1.0,
        "train/tokens_per_second": 5.0,
        "train/epoch": 0.0,
        "train/accuracy_1": 0.5,
    }
    assert sink.rows[1][1] == {"eval/tau": 1.5, "eval/accept_1": 0.4}
    assert sink.rows[2][1] == numbers_of_bench(BENCH)
    assert numbers_of_bench(BENCH) == {"bench/talk/K=3/T=0/tau": 1.75, "bench/talk/K=3/T=0/speed_up": 1.25}
    assert sink.finished is True


def test_a_run_without_numbers_opens_no_sink(subject: TrackedRun) -> None:
    """If all stages are skipped, no empty run appears anywhere."""
    tracking, events_passed = tracker(subject, lambda _: pytest.fail("opened"))
    tracking(StageEvent(stage="train", status="skip"))
    tracking.close(finished=True)
    assert warnings(events_passed) == []


def test_a_sink_that_hangs_stops_nothing(subject: TrackedRun) -> None:
    """No update waits; numbers beyond the queue are dropped with one warning; closing waits only for its patience."""
    sink = Stuck()
    tracking, events_passed = tracker(subject, sink, room=3, patience=0.2)
    began = time.monotonic()
    for number in range(1, 50):
        tracking(step(number))
    assert time.monotonic() - began < 1.0
    tracking.close(finished=True)
    assert time.monotonic() - began < 2.0
    (warning,) = warnings(events_passed)
    assert warning.startswith("kept cannot keep up: it misses numbers from update ")
    assert warning.endswith("; the run continues, and events.jsonl has all of them")
    sink.go.set()


def test_a_sink_that_does_not_end_is_reported(subject: TrackedRun) -> None:
    """A warning says that it may miss the last numbers."""
    sink = Stuck()
    tracking, events_passed = tracker(subject, sink, patience=0.1)
    tracking(step(1))
    tracking.close(finished=False)
    assert warnings(events_passed)[0].startswith("kept does not respond: it may miss the last numbers")
    sink.go.set()


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), SystemExit(3), KeyboardInterrupt("prompt")])
def test_a_sink_that_fails_is_reported_once_and_left_alone(subject: TrackedRun, error: BaseException) -> None:
    """One warning of one line follows whatever its library raises, on opening or writing."""

    def fail(_: TrackedRun) -> Sink:
        raise error

    tracking, events_passed = tracker(subject, fail)
    for number in range(1, 4):
        tracking(step(number))
    tracking.close(finished=True)
    (warning,) = warnings(events_passed)
    assert warning.startswith(f"kept failed and receives nothing more: {type(error).__name__}: ")
    assert "\n" not in warning


def test_a_sink_that_is_not_installed_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """All missing sinks are reported at once."""
    monkeypatch.setattr(sinks, "_is_installed", lambda package: False)
    recipe = load_recipe("smoke", ['tracking.sinks=["wandb", "mlflow"]'])
    with pytest.raises(RecipeError) as caught:
        check_installed(recipe)
    assert [problem.path for problem in caught.value.problems] == ["tracking.sinks"] * 2
    assert "pip install 'spec-recipes[wandb]'" in str(caught.value)
    assert "pip install 'spec-recipes[mlflow]'" in str(caught.value)
    check_installed(load_recipe("smoke"))


def test_every_sink_of_the_format_can_be_opened() -> None:
    """Every name that a recipe may use has a class."""
    assert tuple(OPEN) == SINKS


def fill(name: str, subject: TrackedRun) -> None:
    """Sends a real sink three updates, an evaluation and a benchmark, and expects no warning."""
    events_passed: list[Event] = []
    tracking = Tracker(then=events_passed.append, sinks={name: OPEN[name]}, patience=60)
    tracking.open(subject)
    for number in (1, 2, 3):
        tracking(step(number))
    tracking(EvalEvent(step=3, tau=1.5, metrics={"accept_1": 0.4}))
    tracking.bench(BENCH, step=3)
    tracking.close(finished=True)
    assert warnings(events_passed) == []


def test_tensorboard_reads_back_what_was_written(subject: TrackedRun) -> None:
    """TensorBoard's own reader gives back the numbers."""
    pytest.importorskip("tensorboard", reason="pip install 'spec-recipes[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill("tensorboard", subject)
    reader = EventAccumulator(str(subject.folder / "tensorboard"), size_guidance={"tensors": 0})
    reader.Reload()
    losses = reader.Tensors("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.tensor_proto.float_val[0] for event in losses] == pytest.approx([1, 1 / 2, 1 / 3])
    assert reader.Tensors("eval/tau")[0].tensor_proto.float_val[0] == pytest.approx(1.5)
    assert "bench/talk/K=3/T=0/tau" in reader.Tags()["tensors"]


def test_weights_and_biases_keeps_an_offline_run(subject: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline run has the run folder's name and our series, ready for `wandb sync`."""
    pytest.importorskip("wandb", reason="pip install 'spec-recipes[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(subject.folder))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(subject.folder))
    fill("wandb", subject)
    (file,) = subject.folder.glob("wandb/offline-run-*/run-smoke-1234.wandb")
    content = file.read_bytes()
    for word in (b"train/loss", b"eval/tau", b"bench/talk/K=3/T=0/tau", b"data.sources[0].path"):
        assert word in content


def test_mlflow_keeps_one_run_for_a_run_folder(subject: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has metrics by step and values as parameters; resuming continues the same run."""
    pytest.importorskip("mlflow", reason="pip install 'spec-recipes[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{subject.folder / 'mlruns'}")
    from mlflow import MlflowClient

    fill("mlflow", subject)
    fill("mlflow", subject)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("speculators").experiment_id])
    assert (run.info.run_name, run.info.status) == ("smoke-1234", "FINISHED")
    assert run.data.params == {"seed": "0", "data.sources_0_.path": "x.jsonl"}
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")} == {1, 2, 3}
    assert run.data.metrics["bench/talk/K_3/T_0/tau"] == 1.75
