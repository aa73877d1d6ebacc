"""The stage `train`: puts model, batches and evaluation together, and exports the best checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property

import attrs
import torch

from speculators.contract import parameter_counts, trainer_kwargs
from speculators.data.batches import Align, Batches, StateSource, rows_of_step
from speculators.data.encoded import Conversations
from speculators.data.prefetch import Prefetcher
from speculators.decoding.cache import is_recurrent
from speculators.events import TrainedFacts, WarningEvent
from speculators.files.disk import file_sha256, write_whole
from speculators.files.folders import read_manifest, whole_folder
from speculators.init_from import start_model
from speculators.model import SpeculatorModel
from speculators.nn.layout import RowLayout
from speculators.nn.precision import place
from speculators.pipeline.arguments import DraftVocabulary, training_kwargs
from speculators.pipeline.bench import evaluation
from speculators.pipeline.capture import removing_damaged, state_source
from speculators.pipeline.context import Context
from speculators.pipeline.plugins import is_plugin
from speculators.runs.stages import TrainingRecord
from speculators.training.checkpoint import best, latest
from speculators.training.loop import train
from speculators.training.rng import deterministic
from speculators.training.snapshot import load_weights
from speculators.training.state import Batch, BatchRow, Job
from speculators.training.world import repeatable


def train_stage(context: Context, prepared: Conversations) -> None:
    """Trains from the newest checkpoint, or from the start, and exports the best one."""
    began = time.monotonic()
    recipe, name = context.recipe, context.recipe.algorithm.name
    vocabulary = DraftVocabulary.of(context, prepared)
    kwargs = training_kwargs(context.plan, str(context.folder), vocabulary.tensor)
    # Before the model is built: its first weights depend on the seed.
    deterministic(recipe.seed)
    model = start_model(name, context.plan.facts, kwargs)
    train_kwargs, _ = trainer_kwargs(model, kwargs)
    place(model, context.world.device)
    feed = Feed(context, prepared, state_source(context, prepared), model.align)
    if obstacle := obstacle_to_repeating(context):
        context.emit(WarningEvent(message=f"training again may give other bits: {obstacle}"))
    evaluate = evaluation(context, model)
    if not recipe.data.online:
        context.free_engine()
    job = Job(
        schedule=attrs.evolve(recipe.schedule, precision=context.plan.precision),
        total_steps=feed.total_steps,
        seed=recipe.seed,
        folder=context.run_folder.checkpoints,
        fingerprint=context.plan.stage("train").fingerprint,
        shard=recipe.distributed.shard,
    )
    with context.stage("train") as result:
        # Counted before the loop shards the parameters.
        trainable = parameter_counts(model)["trainable"]
        steps = train(model, job, context.world, batches=feed, train_kwargs=train_kwargs, evaluate=evaluate)
        strict = context.world.device.type == "cuda" and not obstacle
        # The source is closed first: the rows that are built ahead may wait for its states.
        with feed.ahead, closing(feed.source), removing_damaged(), repeatable(enabled=strict):
            for event in steps:
                context.emit(event)
        if context.world.is_main:
            # A model that was never sharded, so that rank 0 can save it whole.
            fresh = start_model(name, context.plan.facts, kwargs)
            record = _export(context, fresh, job, time.monotonic() - began)
            result.facts = TrainedFacts(
                parameters=trainable,
                vocabulary=context.plan.facts.vocab_size,
                draft_vocabulary=context.plan.draft_vocab_size,
                coverage=vocabulary.coverage,
                rare_ends=vocabulary.rare_ends,
                step=record.step,
                total_steps=record.total_steps,
                tau=record.tau,
            )
        context.world.barrier()


def obstacle_to_repeating(context: Context) -> str:
    """Names what keeps training from giving the same bits again, as a clause; "" if nothing does."""
    recipe = context.recipe
    if recipe.data.served and not recipe.data.stored:
        cure = 'data.hidden_states = "server" stores them first'
        return f"servers compute the states anew each time, rounded as their requests happen to be batched; {cure}"
    if context.world.device.type != "cuda":
        return ""
    if is_plugin(recipe.algorithm.name):
        return f"{recipe.algorithm.name} is a plug-in, so its operations are not known to be deterministic on a GPU"
    # It computes on another thread while training does, and torch's strictness is that of the whole process.
    if recipe.data.online and is_recurrent(context.engine(recipe.data.capture_dtype).model):
        cure = 'data.hidden_states = "cached" computes its states beforehand'
        return f"the verifier's linear attention is not deterministic on a GPU; {cure}"
    return ""


def _export(context: Context, model: SpeculatorModel, job: Job, seconds: float) -> TrainingRecord:
    """Writes `speculator/` from the best checkpoint, and last the record that the stage is done."""
    chosen = best(job.folder) or latest(job.folder)
    assert chosen is not None, "training ended without a checkpoint"
    load_weights(model, chosen)
    folder = context.run_folder.speculator
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
    record = TrainingRecord(
        fingerprint=job.fingerprint,
        checkpoint=chosen.name,
        step=int(chosen.name.removeprefix("step-")),
        total_steps=job.total_steps,
        tau=read_manifest(chosen)["tau"],
        seconds=round(seconds, 1),
        files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )
    record.write(context.run_folder)
    return record


def set_served_tokens(context: Context, record: TrainingRecord) -> str:
    """Writes the recipe's first K into a speculator that was exported with another, so that servers draft that many.

    Returns:
        The change, to be appended to a sentence; "" if there is none.
    """
    file, k = context.run_folder.speculator / "config.json", context.recipe.benchmark.num_speculative_tokens[0]
    config = json.loads(file.read_text(encoding="utf-8"))
    method = config["speculators_config"]["proposal_methods"][0]
    before = method["speculative_tokens"]
    if before == k:
        return ""
    method["speculative_tokens"] = k
    write_whole(file, (json.dumps(config, indent=2) + "\n").encode())
    attrs.evolve(record, files={**record.files, file.name: file_sha256(file)}).write(context.run_folder)
    return f"; servers now draft {k} tokens per round, {before} before"


@attrs.define(eq=False)
class Feed:
    """Gives the training loop this process's rows for each update; a pure function of the update's number."""

    context: Context
    prepared: Conversations
    source: StateSource
    align: Align
    _begun: bool = attrs.field(init=False, default=False)

    @cached_property
    def batches(self) -> Batches:
        """The rows by epoch and step."""
        plan, world = self.context.plan, self.context.world
        width = plan.facts.hidden_size
        bf16 = plan.precision == "bf16"
        return Batches(
            conversations=self.prepared,
            source=self.source,
            # The auxiliary layers side by side, and the verifier's last layer.
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
        """Builds rows one step ahead."""
        return Prefetcher(self.batches, self._following, self.context.world.device)

    @cached_property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        schedule = self.context.recipe.schedule
        return schedule.max_steps or sum(self.batches.steps(epoch) for epoch in range(schedule.epochs))

    def place(self, step: int) -> tuple[int, int]:
        """Finds the epoch, and the step within it, of the update that follows `step` updates."""
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
        """Builds this process's part of the batch that follows `step` updates."""
        if not self._begun:
            # Not before: only the checkpoint that training goes on from says which step is the first.
            self.source.follow(self._documents(step))
            self._begun = True
        epoch, place = self.place(step)
        batches, members = self.batches, self._members(epoch, place)
        return Batch(
            epoch=epoch,
            rows=self._rows(epoch, place, members),
            num_rows=len(members),
            tokens=batches.tokens(epoch, place),
            supervised=batches.supervised(epoch, place),
        )

    def _members(self, epoch: int, place: int) -> list[tuple[int, ...]]:
        """Lists the conversations of each of this process's rows."""
        batches, world = self.batches, self.context.world
        rows, every = batches.packed(epoch), batches.rows_per_step
        return rows_of_step(rows, step=place, rows_per_step=every, rank=world.rank, world_size=world.size)

    def _documents(self, first: int) -> Iterator[int]:
        """Yields the conversations that this process reads, from the step after `first` updates to the last."""
        for step in range(first, self.total_steps):
            for row in self._members(*self.place(step)):
                yield from row

    def _rows(self, epoch: int, place: int, members: list[tuple[int, ...]]) -> Iterator[BatchRow]:
        world = self.context.world
        for number, (tensors, documents) in enumerate(zip(self.ahead(epoch, place), members, strict=True)):
            yield BatchRow(
                tensors=tensors,
                layout=RowLayout.of(tensors["document_ids"], tensors["loss_mask"]),
                supervised=int(self.prepared.supervised[list(documents)].sum()),
                # The row's number in the global batch, which seeds its noise whatever the world size.
                index=number * world.size + world.rank,
                documents=self.prepared.names(documents),
            )
