"""One optimizer update: forward and backward over a process's rows, agreement on the result, the optimizer's step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from speculators.errors import ContractError, DataError, TrainingError
from speculators.registry import qualified_name
from speculators.training.optimizer import Optimizer
from speculators.training.rng import seed_row
from speculators.training.schedule import factor
from speculators.training.shard import gathered_once, precision
from speculators.training.state import Batch, BatchRow, Job
from speculators.training.stop import StopRequest
from speculators.training.world import World


@attrs.frozen(kw_only=True, eq=False)
class Worker:
    """What one process needs for all its updates.

    Attributes:
        train_kwargs: passed to every forward.
    """

    model: nn.Module
    optimizer: Optimizer
    job: Job
    world: World
    train_kwargs: Mapping[str, Any]


@attrs.frozen(kw_only=True)
class UpdateResult:
    """What every process knows after an update.

    Attributes:
        metrics: means over the supervised tokens of the global batch, "loss" among them.
        grad_norm: norm of the global gradient, before clipping.
        stop: some process received a request to stop.
    """

    metrics: dict[str, float]
    grad_norm: float
    stop: bool


@attrs.define
class Sums:
    """Weighted sums of the metrics of a process's rows, kept on the device.

    Attributes:
        losses: the loss of each row with its documents, for the message if one is not finite.
    """

    device: torch.device
    names: tuple[str, ...] = ()
    total: torch.Tensor = attrs.field(factory=lambda: torch.zeros(0))
    losses: list[tuple[BatchRow, torch.Tensor]] = attrs.field(factory=list)

    def add(self, row: BatchRow, metrics: Mapping[str, Any], weight: float) -> None:
        """Adds one row's metrics; a row of weight 0 adds nothing."""
        names = tuple(sorted(metrics))
        if self.names and names != self.names:
            raise ContractError(f"forward reported metrics {names} for one row and {self.names} for another")
        self.names = names
        detached = [torch.as_tensor(metrics[name], device=self.device).detach().reshape(()) for name in names]
        self.losses.append((attrs.evolve(row, tensors={}), detached[names.index("loss")]))
        values = torch.stack([value.double() for value in detached])
        # Not values * 0: without supervised tokens metrics may be nan, and nan * 0 is nan.
        weighted = values * weight if weight > 0 else torch.zeros_like(values)
        self.total = self.total + weighted if len(self.losses) > 1 else weighted


def accepted_by(model: nn.Module, names: Mapping[str, Any]) -> set[str]:
    """Selects those of `names` that the model's forward accepts: all, if it takes **kwargs."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return set(names)
    return set(names) & {parameter.name for parameter in parameters}


def update(worker: Worker, batch: Batch, *, step: int, request: StopRequest) -> UpdateResult:
    """Makes one update, or leaves weights and optimizer as they were and raises.

    The host reads from the device only once, before the optimizer steps: it must know whether loss and gradient are
    finite, because a bad update cannot be undone. By then the whole batch is queued, and only the optimizer's launch
    waits.

    Args:
        step: updates made before this one.
        request: this process's request to stop; the result holds what all processes agreed on.

    Raises:
        TrainingError: loss or gradient are not finite.
    """
    job, world, optimizer = worker.job, worker.world, worker.optimizer
    sums = _backward(worker, batch, step)
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
    if not gradients:
        raise ContractError("forward's loss gave no gradient to any trained parameter")
    norm = _whole(get_total_norm(gradients))
    # One collective for metrics and stop flag: the flag makes all processes stop after the same update.
    flag = sums.total.new_full((1,), float(request.requested))
    summed = world.sum(torch.cat([sums.total, flag]))
    *values, stops, grad_norm = torch.cat([summed, norm.to(summed.dtype).reshape(1)]).tolist()
    metrics = dict(zip(sums.names, values, strict=True))
    outcome = UpdateResult(metrics=metrics, grad_norm=grad_norm, stop=stops > 0)
    if not (math.isfinite(metrics["loss"]) and math.isfinite(outcome.grad_norm)):
        raise _not_finite(outcome, sums, step, job, world)
    section = job.schedule.optimizer
    if section.clip_norm is not None:
        clip_grads_with_norm_(optimizer.parameters, section.clip_norm, norm)
    optimizer.step(factor(step, job.total_steps, job.schedule.learning_rate))
    optimizer.average.update(step)
    return outcome


def _backward(worker: Worker, batch: Batch, step: int) -> Sums:
    """Accumulates the gradient of the mean loss over the supervised tokens of the global batch.

    Every row's loss is a mean over its own supervised tokens, so a row weighs by its share of the batch's. That makes
    the update independent of how rows are spread over processes.
    """
    model, job, world = worker.model, worker.job, worker.world
    if batch.supervised == 0:
        raise DataError(f"step {step + 1}: no token of the whole batch is supervised")
    sums, seen = Sums(device=world.device), 0
    with gathered_once(model):
        for row in batch.rows:
            seen += 1
            seed_row(job.seed, step, row.index)
            inputs: dict[str, Any] = _to_device(_supervised_somewhere(row), world.device)
            if row.layout is not None and row.supervised > 0:
                inputs["layout"] = row.layout
            names = accepted_by(model, inputs)
            with precision(world, job.schedule.precision):
                result = model(**{name: inputs[name] for name in names}, **worker.train_kwargs)
            loss, metrics = loss_and_metrics(model, result)
            share = row.supervised / batch.supervised
            # FSDP averages gradients over the processes; times the world size, that is a sum.
            (loss * (share * world.size)).backward()
            sums.add(row, metrics, share)
    assert seen == batch.num_rows, f"a batch of {batch.num_rows} rows gave {seen}"
    return sums


def loss_and_metrics(model: nn.Module, result: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Checks what a forward returned against the contract.

    Raises:
        ContractError: names the model and the part of the contract that it breaks.
    """
    place = qualified_name(type(model))
    if not (isinstance(result, tuple) and len(result) == 3):
        kind = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ContractError(f"{place}.forward returned {kind}", hint="return output, loss, metrics")
    _, loss, metrics = result
    if not (isinstance(metrics, Mapping) and "loss" in metrics):
        raise ContractError(f'{place}.forward returned metrics without "loss"', hint='metrics["loss"] = loss.detach()')
    if many := sorted(name for name, value in metrics.items() if not _is_number(value)):
        raise ContractError(
            f"{place}.forward returned metrics that are not single numbers: {', '.join(many)}",
            hint="return their mean, detached",
        )
    if not (isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1):
        raise ContractError(f"{place}.forward's loss is not a single number with a gradient")
    return loss, metrics


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _supervised_somewhere(row: BatchRow) -> Mapping[str, torch.Tensor]:
    """Returns the row's tensors; a row without supervised tokens becomes one document that is all supervised.

    Such a row (an empty one, or nothing but padding) has weight 0, but it must run, because other processes wait for
    this one in their collectives. A mean over no tokens would be 0/0, and its gradient nan even times zero.
    """
    if row.supervised > 0:
        return row.tensors
    mask = row.tensors["loss_mask"]
    one = {
        "loss_mask": torch.ones_like(mask),
        "document_ids": torch.zeros_like(row.tensors["document_ids"]),
        "position_ids": torch.arange(mask.shape[1], device=mask.device)[None],
    }
    return {**row.tensors, **one}


def _to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    # From pinned memory, the copy overlaps with the computation of the row before.
    pinned = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}


def _not_finite(outcome: UpdateResult, sums: Sums, step: int, job: Job, world: World) -> TrainingError:
    """Builds the error, gathering the faulty rows from all processes."""
    mine = [(row.index, float(loss), row.documents) for row, loss in sums.losses]
    rows = sorted(row for theirs in world.gather(mine) for row in theirs)
    bad = [row for row in rows if not math.isfinite(row[1])]
    fault = f"the loss is {outcome.metrics['loss']}" if bad else f"the norm of the gradient is {outcome.grad_norm}"
    listed = "; ".join(
        f"row {index} (loss {loss:.4g}; conversations: {', '.join(documents) or 'not named'})"
        for index, loss, documents in bad or rows
    )
    return TrainingError(f"step {step + 1} of {job.total_steps}: {fault}, in {listed}")
