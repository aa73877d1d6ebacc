"""A toy algorithm and its batches for the tests of training: the contract and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from speculators.events import Event
from speculators.recipe.schema import LearningRate, OptimizerSection, ScheduleSection
from speculators.training.checkpoint import latest
from speculators.training.loop import train
from speculators.training.rng import deterministic
from speculators.training.shard import whole
from speculators.training.snapshot import load_weights
from speculators.training.state import Batch, BatchRow, Job
from speculators.training.world import World

HIDDEN, VOCABULARY, ROWS, TOKENS = 16, 40, 4, 12
STEPS = 6
ADAMW = OptimizerSection(lr=1e-2, weight_decay=0.1)
MUON = OptimizerSection(name="muon", lr=1e-2, adamw_lr=3e-3, weight_decay=0.1)


class Block(nn.Module):
    """A residual layer with a norm and dropout."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.scale = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)

    def forward(self, states):
        inner = F.dropout(torch.relu(self.up(self.norm(states))), 0.2, self.training)
        return states + self.down(inner) * self.scale


class Toy(nn.Module):
    """Runs its layers once for each unrolled step; `host_random` also draws from Python and numpy."""

    def __init__(self, *, host_random: bool = False):
        super().__init__()
        self.host_random = host_random
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.embed_tokens.weight.requires_grad_(False)
        self.register_buffer("d2t", torch.arange(VOCABULARY))
        self.fc = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, hidden_states, input_ids, loss_mask, *, ttt_steps):
        """Accepts three of the six names of a row, and no **kwargs."""
        states, loss, right = self.fc(hidden_states) + self.embed_tokens(input_ids), 0.0, 0.0
        labels = input_ids[loss_mask]
        for _ in range(ttt_steps):
            for layer in self.layers:
                states = layer(states)
            if self.host_random:
                states = states * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
            logits = self.lm_head(self.norm(states))[loss_mask].float()
            loss = loss + F.cross_entropy(logits, labels) / ttt_steps
            right = right + (logits.argmax(-1) == labels).float().mean() / ttt_steps
        return states, loss, {"loss": loss.detach(), "accuracy": right}


def build(seed: int = 0, *, host_random: bool = False) -> Toy:
    """Builds a toy with seeded weights."""
    deterministic(seed)
    return Toy(host_random=host_random)


def make_row(step: int, index: int) -> BatchRow:
    """Makes row `index` of the global batch of `step`; each step has one row without a supervised token."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    share = 0.0 if index == step % ROWS else 0.3 + 0.1 * index
    mask = torch.rand(1, TOKENS, generator=generator) < share
    if share:
        mask[0, 0] = True
    tensors = {
        "hidden_states": torch.randn(1, TOKENS, 3 * HIDDEN, generator=generator),
        "verifier_last_hidden_states": torch.randn(1, TOKENS, HIDDEN, generator=generator),
        "input_ids": torch.randint(VOCABULARY, (1, TOKENS), generator=generator),
        "loss_mask": mask,
        "position_ids": torch.arange(TOKENS)[None],
        "document_ids": torch.zeros(1, TOKENS, dtype=torch.int64),
    }
    return BatchRow(tensors=tensors, supervised=int(mask.sum()), index=index, documents=(f"doc-{step}-{index}",))


def batches(
    world: World, *, count: int = ROWS, before: Callable[[int], None] = lambda step: None
) -> Callable[[int], Batch]:
    """Makes the pure batch function, of `count` rows; `before` is called with each step and may do harm."""

    def batch(step: int) -> Batch:
        before(step)
        rows = [make_row(step, index) for index in range(count)]
        part = count // world.size
        return Batch(
            epoch=step // 3,
            rows=iter(rows[world.rank * part : (world.rank + 1) * part]),
            num_rows=part,
            tokens=count * TOKENS,
            supervised=sum(row.supervised for row in rows),
        )

    return batch


def make_job(folder: Path, *, optimizer: OptimizerSection = ADAMW, **changes: Any) -> Job:
    """Makes a job of six updates; `changes` are fields of Job or of its schedule."""
    schedule = ScheduleSection(
        optimizer=optimizer,
        learning_rate=LearningRate(warmup=0.3),
        precision="fp32",
        evaluate_every=100,
        checkpoint_every=2,
    )
    own = {field.name for field in attrs.fields(Job)}
    schedule = attrs.evolve(schedule, **{name: value for name, value in changes.items() if name not in own})
    job = Job(schedule=schedule, total_steps=STEPS, seed=7, folder=folder, fingerprint="f" * 64)
    return attrs.evolve(job, **{name: value for name, value in changes.items() if name in own})


def run(model: Toy, job: Job, world: World | None = None, **more: Any) -> Iterator[Event]:
    """Trains the toy."""
    world = world or World()
    more = {"batches": batches(world), "train_kwargs": {"ttt_steps": 3}, **more}
    return train(model, job, world, **more)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies all parameters and buffers, whole."""
    with whole(model):
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: value.detach().clone() for name, value in named}


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the trained parameters that would be exported from the newest checkpoint into a toy of other weights."""
    model = build(seed=99)
    load_weights(model, latest(folder))
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
