"""Times the real training loop on real conversations: ours, or ours and the peer's in turn, on the same samples.

    python -m benchmarks.perf.samples quickstart FOLDER
    python -m benchmarks.perf.train_loop FOLDER [--steps 8]
    python -m benchmarks.perf.train_loop FOLDER --peer PEER/bin/python [--rounds 3]

Our side is speculators.training.loop.train with the recipe's schedule, fed as `spec run` feeds it. The peer's side is
benchmarks/perf/peer_loop.py. benchmarks/README.md defines the figures.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.perf.samples import read_facts, stages
from benchmarks.perf.side_by_side import Column, Side, interleave, report, table
from speculators.contract import build_model, trainer_kwargs
from speculators.events import StepEvent
from speculators.pipeline.train import Feed
from speculators.runs.places import Places
from speculators.training.loop import train
from speculators.training.rng import deterministic
from speculators.training.state import Batch, Job
from speculators.training.world import World

COLUMNS = (
    Column(key="tokens_per_s", title="conversation tokens/s"),
    Column(key="peak_rss_mb", title="peak RSS MB", higher_is_better=False),
)
PEER = Path(__file__).with_name("peer_loop.py")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times our loop and returns the figures of the table in benchmarks/README.md."""
    torch.set_num_threads(options.threads)
    facts = read_facts(folder)
    inputs = stages(facts["recipe"], facts["overrides"], Places())
    if inputs.prepared.fingerprint != facts["data"]:
        raise SystemExit(f"{folder} holds different conversations from the recipe's: write it again")
    recipe = inputs.context.recipe
    # Checkpoints are outside the measured time on both sides; this also avoids writing them to disk.
    schedule = attrs.evolve(recipe.schedule, checkpoint_every="100%")
    deterministic(recipe.seed)
    model = build_model(recipe.algorithm.name, inputs.context.plan.facts, inputs.kwargs)
    train_kwargs, _ = trainer_kwargs(model, inputs.kwargs)
    total = options.warmup + options.steps
    feed = Feed(inputs.context, inputs.prepared, inputs.source, model.align)
    request_times: list[float] = []

    def batches(step: int) -> Batch:
        request_times.append(time.perf_counter())
        return feed(step)

    with tempfile.TemporaryDirectory(prefix="train_loop_") as temporary, feed.ahead:
        job = Job(
            schedule=schedule, total_steps=total, seed=recipe.seed, folder=Path(temporary), fingerprint="benchmark"
        )
        ended = list(_ends(train(model, job, World(), batches=batches, train_kwargs=train_kwargs)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    updates = zip(ended, request_times, strict=True)
    steps = [(event.tokens, end - begin) for (event, end), begin in updates][options.warmup :]
    tokens, seconds = (sum(column) for column in zip(*steps, strict=True))
    return {
        "side": "ours",
        "draft_vocab": facts["draft_vocab_size"],
        "dtype": inputs.kwargs["dtype"],
        "optimizer": schedule.optimizer.name,
        "loss": inputs.kwargs["loss"],
        "row_tokens": facts["row_tokens"],
        "rows_per_step": facts["rows_per_step"],
        "steps": len(steps),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "best_tokens_per_s": round(max(count / duration for count, duration in steps), 1),
        "peak_rss_mb": peak,
        "loss_first": ended[0][0].loss,
        "loss_last": ended[-1][0].loss,
        "threads": options.threads,
        "loadavg": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _ends(events: Iterator[Any]) -> Iterator[tuple[StepEvent, float]]:
    """Yields each update's event with its arrival time, which is before a checkpoint is written."""
    for event in events:
        if isinstance(event, StepEvent):
            yield event, time.perf_counter()


def compare(options: argparse.Namespace) -> None:
    """Runs both sides and prints the table."""
    facts = read_facts(options.folder)
    shared = [str(options.folder), "--steps", str(options.steps), "--warmup", str(options.warmup)]
    shared += ["--threads", str(options.threads)]
    sides = (
        Side("ours", (sys.executable, "-m", "benchmarks.perf.train_loop", *shared)),
        Side("peer", (options.peer, str(PEER), *shared)),
    )
    results = interleave(sides, rounds=options.rounds, threads=options.threads)
    cell = f"D = {facts['draft_vocab_size']}, rows of {facts['row_tokens']}"
    share = facts["supervised"] / facts["tokens"]
    print(f"{facts['conversations']} conversations, {facts['tokens']} tokens, {share:.0%} supervised,")
    print(f"{facts['algorithm']} {facts['settings']}, {options.threads} threads,")
    print(f"medians of {options.rounds} processes per side, in turn, {options.steps} steps each\n")
    print(table({cell: results}, COLUMNS))
    report(results)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by benchmarks.perf.samples")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", help="the peer's Python: run both sides in turn")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    options = parser.parse_args()
    if options.peer is None:
        report(measure(options.folder, options))
    else:
        compare(options)


if __name__ == "__main__":
    main()
