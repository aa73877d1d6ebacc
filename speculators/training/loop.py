"""The training loop: a generator of events that resumes where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from speculators.errors import TrainingError
from speculators.events import EvalEvent, Event, StepEvent
from speculators.training.checkpoint import Checkpoints, latest
from speculators.training.optimizer import Optimizer
from speculators.training.schedule import due, factor
from speculators.training.shard import shard, whole
from speculators.training.state import Batch, Batches, Evaluate, Job, TrainState
from speculators.training.stop import StopRequest
from speculators.training.update import UpdateResult, Worker, update
from speculators.training.world import World


@attrs.define
class Clock:
    """Measures the time spent in updates since this process began, without evaluations and checkpoints."""

    seconds: float = 0.0
    updates: int = 0
    last: float = 0.0

    def note(self, seconds: float) -> None:
        """Adds the time of one update."""
        self.seconds, self.updates, self.last = self.seconds + seconds, self.updates + 1, seconds

    def left(self, updates: int) -> float:
        """Estimates the seconds that this many updates will take."""
        return updates * self.seconds / self.updates


def train(
    model: nn.Module,
    job: Job,
    world: World,
    *,
    batches: Batches,
    train_kwargs: Mapping[str, Any],
    evaluate: Evaluate | None = None,
) -> Iterator[Event]:
    """Trains `model` in place from the newest checkpoint in `job.folder`, or from the start.

    A run that is interrupted at any moment and called again with an equally built model ends with the same weights,
    bit for bit. The first Ctrl-C or SIGTERM ends it after the current update, with a checkpoint.

    Args:
        model: on `world.device`, meeting the contract; sharded here if the world is larger than one.
        batches: maps the number of updates made to this process's share of the next batch; a pure function, so that a
            resumed run sees the same rows.
        train_kwargs: passed to every forward, as `get_trainer_kwargs` gave them.
        evaluate: returns exact acceptance length and metrics of the current model, whose parameters are averages where
            the schedule has them; called on every process, with whole parameters and without gradients; the result of
            rank 0 counts.

    Yields:
        WarningEvent for each damaged checkpoint; then StepEvent for each update, EvalEvent and SaveEvent when due.

    Raises:
        TrainingError: loss or gradient are not finite; names the rows and the last good checkpoint.
        ArtifactError: a checkpoint cannot be written, or belongs to another run.
        KeyboardInterrupt: it was asked to stop; the checkpoint has been saved.
    """
    shard(model, world, over=job.shard, gradient_precision=job.schedule.gradient_precision)
    worker = Worker(
        model=model,
        optimizer=Optimizer(model, job.schedule.optimizer, ema=job.schedule.ema),
        job=job,
        world=world,
        train_kwargs=train_kwargs,
    )
    checkpoints = Checkpoints(
        folder=job.folder, world=world, keep=job.schedule.keep_checkpoints, fingerprint=job.fingerprint
    )
    state = yield from checkpoints.resume(model, worker.optimizer)
    model.train()
    yield from _updates(worker, checkpoints, state, batches=batches, evaluate=evaluate)


def _updates(
    worker: Worker, checkpoints: Checkpoints, state: TrainState, *, batches: Batches, evaluate: Evaluate | None
) -> Iterator[Event]:
    job, clock = worker.job, Clock()
    with StopRequest() as request:
        while state.step < job.total_steps:
            began = time.perf_counter()
            batch = batches(state.step)
            outcome = _update(worker, batch, state.step, request)
            clock.note(time.perf_counter() - began)
            state = state.after_update(batch.tokens)
            yield _step_event(state, batch, outcome, job, clock)
            tau = None
            # Even when a stop was requested: an evaluation left out here would never be made up for, and the resumed
            # run could end with another best checkpoint.
            if evaluate is not None and _due(state, job.schedule.evaluate_every, job):
                tau, metrics = _evaluate(worker, evaluate)
                state = state.after_evaluation(tau)
                yield EvalEvent(step=state.step, tau=tau, metrics=metrics)
            if outcome.stop or state.best_step == state.step or _due(state, job.schedule.checkpoint_every, job):
                yield checkpoints.save(worker.model, worker.optimizer, state, tau)
            if outcome.stop:
                raise KeyboardInterrupt
        # Requested during the last evaluation: whatever follows training must not run either.
        if request.requested:
            raise KeyboardInterrupt


def _update(worker: Worker, batch: Batch, step: int, request: StopRequest) -> UpdateResult:
    try:
        return update(worker, batch, step=step, request=request)
    except TrainingError as error:
        good = latest(worker.job.folder)
        raise TrainingError(
            str(error),
            hint=f"the last good checkpoint is {good}" if good else "no checkpoint was saved yet",
        ) from error


def _due(state: TrainState, every: int | str, job: Job) -> bool:
    return due(state.step, every, job.total_steps)


def _evaluate(worker: Worker, evaluate: Evaluate) -> tuple[float, dict[str, float]]:
    model = worker.model
    model.eval()
    # The weights that are exported.
    with worker.optimizer.average.in_place(), whole(model), torch.no_grad():
        measured = evaluate()
    model.train()
    # Every process must decide alike whether this is the best checkpoint, so rank 0's numbers count.
    result: tuple[float, dict[str, float]] = worker.world.broadcast(measured)
    return result


def _step_event(state: TrainState, batch: Batch, outcome: UpdateResult, job: Job, clock: Clock) -> StepEvent:
    schedule = job.schedule
    return StepEvent(
        step=state.step,
        total_steps=job.total_steps,
        epoch=batch.epoch,
        loss=outcome.metrics["loss"],
        learning_rate=schedule.optimizer.lr * factor(state.step - 1, job.total_steps, schedule.learning_rate),
        grad_norm=outcome.grad_norm,
        tokens=batch.tokens,
        tokens_per_second=batch.tokens / clock.last,
        seconds_left=clock.left(job.total_steps - state.step),
        metrics={name: value for name, value in outcome.metrics.items() if name != "loss"},
    )
