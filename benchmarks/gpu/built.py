"""A recipe's model with random weights on the device, and rows for one update of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch

from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.shapes import facts_of
from speculators.contract import build_model, trainer_kwargs
from speculators.cost.trace import attach_head, row_of, states_of
from speculators.model import SpeculatorModel
from speculators.pipeline.arguments import stand_in_vocabulary, training_kwargs
from speculators.pipeline.setup import on_this_machine
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import LearningRate
from speculators.training.optimizer import Optimizer
from speculators.training.state import Batch, BatchRow, Job
from speculators.training.stop import StopRequest
from speculators.training.update import UpdateResult, Worker, update
from speculators.training.world import World
from speculators.verifier.head import HeadRules

# Tokens of a reduced vocabulary at tiny sizes; the whole one is shapes.SMALL's.
SMALL_DRAFTS = 256


def plan_of(recipe: str, fixture: str, setup: PartSetup) -> Plan:
    """Plans a shipped recipe for the verifier of a fixture, in the precision of this machine."""
    facts = facts_of(fixture, small=setup.small)
    loaded = load_recipe(recipe)
    size = loaded.algorithm.config.draft_vocab_size
    if setup.small and size is not None and size > SMALL_DRAFTS:
        loaded = load_recipe(recipe, [f"algorithm.draft_vocab_size={SMALL_DRAFTS}"])
    return on_this_machine(make_plan(loaded, facts))


@attrs.define(eq=False)
class Trainee:
    """A model that is trained on the same rows again and again.

    Attributes:
        worker: of the training loop's own update.
        batch: its rows lie on the device.
    """

    worker: Worker
    batch: Batch

    @classmethod
    def of(cls, plan: Plan, lengths: Sequence[int], rows: int, device: torch.device) -> Trainee:
        """Builds the model of a plan, and a batch that has `rows` times the same row of documents, all supervised."""
        torch.manual_seed(0)
        with torch.device(device):
            kwargs = training_kwargs(plan, None, stand_in_vocabulary(plan))
            model = build_model(plan.recipe.algorithm.name, plan.facts, kwargs)
            attach_head(model, plan, HeadRules.of(plan.facts))
            states = {name: tensor.normal_() for name, tensor in states_of(plan, sum(lengths)).items()}
        model.to(device)
        _fill(model)
        schedule = attrs.evolve(
            plan.recipe.schedule,
            precision=plan.precision,
            learning_rate=LearningRate(shape="constant", warmup=0.0),
        )
        worker = Worker(
            model=model.train(),
            optimizer=Optimizer(model, schedule.optimizer, ema=schedule.ema),
            job=Job(schedule=schedule, total_steps=100, seed=0, folder=Path(), fingerprint=""),
            world=World(device=device),
            train_kwargs=trainer_kwargs(model, kwargs)[0],
        )
        tensors, layout = row_of(lengths, 1.0)
        row = {name: tensor.to(device) for name, tensor in {**tensors, **states}.items()}
        supervised = int(tensors["loss_mask"].sum())
        made = [BatchRow(tensors=row, supervised=supervised, index=i, layout=layout) for i in range(rows)]
        batch = Batch(epoch=0, rows=tuple(made), num_rows=rows, tokens=rows * layout.size, supervised=rows * supervised)
        return cls(worker, batch)

    @property
    def model(self) -> SpeculatorModel:
        """The model in training."""
        model: Any = self.worker.model
        assert isinstance(model, SpeculatorModel)
        return model

    def update(self) -> UpdateResult:
        """Makes the training loop's own update."""
        return update(self.worker, self.batch, step=0, request=StopRequest())

    def gradients(self) -> dict[str, torch.Tensor]:
        """Makes an update that leaves the weights as they are, and returns what the optimizer received."""
        received: dict[str, torch.Tensor] = {}

        def keep(_: float) -> None:
            named = self.model.named_parameters()
            received.update((name, p.grad.clone()) for name, p in named if p.grad is not None)
            self.model.zero_grad()

        with patch.object(self.worker.optimizer, "step", keep):
            self.update()
        return received


@torch.no_grad()
def _fill(model: SpeculatorModel) -> None:
    """Gives every tensor values of a usual size: a model that was built without a verifier lacks some."""
    head: Any = getattr(model, "target_head", None)
    tensors = [*model.parameters(), *(() if head is None else head.buffers())]
    for tensor in tensors:
        if tensor.ndim > 1:
            tensor.normal_(std=0.02)
        else:
            tensor.fill_(1.0)
