"""One small class for each sink. A sink's library is imported when the sink is opened, on its own thread."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs

from speculators.errors import Problem, RecipeError
from speculators.recipe.schema import Recipe


@attrs.frozen(kw_only=True)
class TrackedRun:
    """The run that a sink is opened for.

    Attributes:
        name: name of the run folder, which a resumed run shares.
        folder: the run folder.
        values: the recipe's values by TOML path.
    """

    name: str
    folder: Path
    values: Mapping[str, Any]


class Sink(Protocol):
    """Receives numbers; may block or raise, since it runs on a thread of its own."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Receives the measurements after `step` updates; a resumed run may repeat some."""

    def close(self, *, finished: bool) -> None:
        """Flushes what is left; `finished` is False for an interrupted run."""


class TensorBoard:
    """Writes event files into `RUN/tensorboard`, for `tensorboard --logdir runs`."""

    def __init__(self, subject: TrackedRun) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(subject.folder / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Appends scalars."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()  # by default only every two minutes

    def close(self, *, finished: bool) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """Logs to one W&B run per run folder; WANDB_PROJECT, WANDB_MODE and its other variables apply."""

    def __init__(self, subject: TrackedRun) -> None:
        import wandb

        # Nobody is there to answer a question, and the live view owns the terminal. Timeouts are in seconds: by default
        # W&B's exit hook waits for pending uploads for ever.
        quiet = {"console": "off", "silent": True, "login_timeout": 1}
        wandb.setup(settings=wandb.Settings(**quiet, init_timeout=20, finish_timeout=8))
        self._run = wandb.init(
            id=subject.name,
            name=subject.name,
            resume="allow",
            dir=subject.folder,
            config=dict(subject.values),
        )
        # W&B's own step may only grow, but a resumed run repeats updates.
        self._run.define_metric("*", step_metric="update")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs one row."""
        self._run.log({"update": step, **numbers})

    def close(self, *, finished: bool) -> None:
        """Waits for pending uploads, within the timeout."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """Logs to one MLflow run per run folder; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply."""

    LONGEST = 500  # characters of a parameter

    def __init__(self, subject: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        self._client = MlflowClient()
        name = MLFLOW_EXPERIMENT_NAME.get() or "speculators"
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        known = self._client.search_runs([experiment], f"attributes.run_name = '{subject.name}'", max_results=1)
        run = known[0] if known else self._client.create_run(experiment, run_name=subject.name)
        self._run_id = run.info.run_id
        for path, value in subject.values.items():
            if path not in run.data.params:
                self._client.log_param(self._run_id, self._name(path), str(value)[: self.LONGEST])

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends one batch."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(self._name(name), number, now, step) for name, number in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self._run_id, status="FINISHED" if finished else "KILLED")

    @staticmethod
    def _name(text: str) -> str:
        """Replaces characters that MLflow does not accept."""
        return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in text)


OPEN: Mapping[str, Callable[[TrackedRun], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_installed(recipe: Recipe) -> None:
    """Raises RecipeError for sinks that are not installed, before anything runs rather than after the training.

    A sink, its package and the extra that installs it have the same name.
    """
    problems = [
        Problem(
            "tracking.sinks",
            f'names "{sink}", which is not installed',
            f"pip install 'spec-recipes[{sink}]', or leave it out: events.jsonl is written in any case",
        )
        for sink in recipe.tracking.sinks
        if not _is_installed(sink)
    ]
    if problems:
        raise RecipeError(problems)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
