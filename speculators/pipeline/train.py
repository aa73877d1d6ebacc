"""The stage `train`: model, rows and evaluation put together; the best checkpoint exported as a speculator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs
import torch

from speculators.contract import parameter_counts, trainer_kwargs
from speculators.data.batches import Align, Batches, StateSource, rows_of_step
from speculators.data.encoded import Conversations
from speculators.data.prefetch import Prefetcher
from speculators.files.disk import file_sha256, read_json, write_json, write_whole
from speculators.files.folders import whole_folder
from speculators.init_from import start_model
from speculators.model import SpeculatorModel
from speculators.nn.layout import RowLayout
from speculators.nn.precision import place
from speculators.pipeline.arguments import training_kwargs, vocabulary_of
from speculators.pipeline.bench import evaluation
from speculators.pipeline.capture import state_source
from speculators.pipeline.context import Context
from speculators.runs.stages import SPECULATOR, TRAINED
from speculators.training.checkpoint import best, latest
from speculators.training.loop import train
from speculators.training.rng import deterministic
from speculators.training.snapshot import load_weights
from speculators.training.state import Batch, Job, Row


def train_stage(context: Context, prepared: Conversations) -> None:
    """Trains from the newest checkpoint, or from the start, and exports the best one."""
    began = time.monotonic()
    vocabulary, covers = vocabulary_of(context, prepared)
    kwargs = training_kwargs(context.plan, str(context.folder), vocabulary)
    name, recipe = context.recipe.algorithm.name, context.recipe
    deterministic(recipe.seed)
    model = start_model(name, context.plan.facts, kwargs)
    train_kwargs, _ = trainer_kwargs(model, kwargs)
    place(model, context.world.device)
    feed = Feed(context, prepared, state_source(context, prepared), model.align)
    evaluate = evaluation(context, model)
    if recipe.data.stored:
        context.free_engine()
    job = Job(
        schedule=attrs.evolve(recipe.schedule, precision=context.plan.precision),
        total_steps=feed.total_steps,
        seed=recipe.seed,
        folder=context.run_folder / "checkpoints",
        fingerprint=context.plan.stage("train").fingerprint,
        shard=recipe.distributed.shard,
    )
    with context.stage("train") as words:
        trainable = parameter_counts(model)["trainable"]
        steps = train(model, job, context.world, batches=feed, train_kwargs=train_kwargs, evaluate=evaluate)
        with feed.ahead:
            for event in steps:
                context.tell(event)
        if context.world.is_main:
            held = _export(context, start_model(name, context.plan.facts, kwargs), job, time.monotonic() - began)
            words += [f"{trainable:,} trainable parameters", covers, _best_words(held)]
        context.world.barrier()


def _best_words(held: dict[str, Any]) -> str:
    if held["tau"] is None:
        return f"no suite to choose by: the last of {held['step']} updates is taken"
    return f"best at update {held['step']} of {held['total_steps']}, acceptance length {held['tau']:.3f}"


def _export(context: Context, model: SpeculatorModel, job: Job, seconds: float) -> dict[str, Any]:
    """Writes `speculator/` from the best checkpoint, and last the note that the stage is done."""
    chosen = best(job.folder) or latest(job.folder)
    assert chosen is not None, "training ended without a checkpoint"
    load_weights(model, chosen)
    folder = context.run_folder / SPECULATOR
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
    held = read_json(chosen / "manifest.json")
    done = {
        "fingerprint": job.fingerprint,
        "checkpoint": chosen.name,
        "step": int(chosen.name.removeprefix("step-")),
        "total_steps": job.total_steps,
        "tau": held["tau"],
        "seconds": round(seconds, 1),
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }
    write_json(context.run_folder / TRAINED, done)
    return done


def serve_with(context: Context, held: Mapping[str, Any]) -> str:
    """Puts the recipe's first K into a speculator that was exported with another, for servers draft as it says.

    Returns:
        What was changed, in words; "" where it said so already.
    """
    file, wanted = context.run_folder / SPECULATOR / "config.json", context.recipe.benchmark.num_speculative_tokens[0]
    config = json.loads(file.read_text(encoding="utf-8"))
    method = config["speculators_config"]["proposal_methods"][0]
    before = method["speculative_tokens"]
    if before == wanted:
        return ""
    method["speculative_tokens"] = wanted
    write_whole(file, (json.dumps(config, indent=2) + "\n").encode())
    note = {**held, "files": {**held["files"], file.name: file_sha256(file)}}
    write_json(context.run_folder / TRAINED, note)
    return f"; servers draft {wanted} tokens a round now, {before} before"


@attrs.define(eq=False)
class Feed:
    """Gives each update's rows of this process; a pure function of the update's number."""

    context: Context
    prepared: Conversations
    source: StateSource
    align: Align

    @cached_property
    def batches(self) -> Batches:
        """The rows by epoch and step."""
        plan, world = self.context.plan, self.context.world
        width = plan.facts.hidden_size
        bf16 = plan.precision == "bf16"
        return Batches(
            conversations=self.prepared,
            source=self.source,
            widths=(len(plan.target_layer_ids) * width, width),
            row_tokens=plan.row_tokens,
            rows_per_step=plan.rows_per_step,
            seed=plan.recipe.seed,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            align=self.align,
            rank=world.rank,
            world_size=world.size,
        )

    @cached_property
    def ahead(self) -> Prefetcher:
        """The rows, built one step ahead."""
        return Prefetcher(self.batches, self._following)

    @cached_property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        schedule = self.context.recipe.schedule
        return schedule.max_steps or sum(self.batches.steps(epoch) for epoch in range(schedule.epochs))

    def place(self, step: int) -> tuple[int, int]:
        """Returns the epoch and the step within it of the update after `step` updates."""
        epoch = 0
        while step >= (steps := self.batches.steps(epoch)):
            step -= steps
            epoch += 1
        return epoch, step

    def _following(self, epoch: int, step: int) -> tuple[int, int] | None:
        after = (epoch, step + 1) if step + 1 < self.batches.steps(epoch) else (epoch + 1, 0)
        done = sum(self.batches.steps(before) for before in range(after[0])) + after[1]
        return after if done < self.total_steps else None

    def __call__(self, step: int) -> Batch:
        """Returns this process's part of the batch after `step` updates."""
        epoch, place = self.place(step)
        batches, world = self.batches, self.context.world
        members = rows_of_step(
            batches.packed(epoch),
            step=place,
            rows_per_step=batches.rows_per_step,
            rank=world.rank,
            world_size=world.size,
        )
        return Batch(
            epoch=epoch,
            rows=self._rows(epoch, place, members),
            num_rows=len(members),
            tokens=batches.tokens(epoch, place),
            supervised=batches.supervised(epoch, place),
        )

    def _rows(self, epoch: int, place: int, members: list[tuple[int, ...]]) -> Iterator[Row]:
        world = self.context.world
        for number, (tensors, documents) in enumerate(zip(self.ahead(epoch, place), members, strict=True)):
            yield Row(
                tensors=tensors,
                layout=RowLayout.of(tensors["document_ids"], tensors["loss_mask"]),
                supervised=int(self.prepared.supervised[list(documents)].sum()),
                index=number * world.size + world.rank,
                documents=tuple(self._names[index] for index in documents),
            )

    @cached_property
    def _names(self) -> list[str]:
        return self.prepared.ids()
