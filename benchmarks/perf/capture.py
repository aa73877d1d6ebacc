"""Times capture against a bare forward of the same verifier without its head, in turn on the same batches.

python -m benchmarks.perf.capture FOLDER [--tokens 4096] [--rounds 3]

FOLDER is a verifier's Hugging Face folder. Prints both sides in tokens/s (without padding) and their ratio, in float32
and bfloat16. Rows have the lengths of short chats: 64 to 384 tokens, from a fixed seed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from speculators.verifier.capture import batches_by_length
from speculators.verifier.engine import Engine

BATCH_TOKENS = 2048


class Seconds(NamedTuple):
    """Wall clock and processor time; other processes on the machine disturb only the first."""

    wall: float
    cpu: float


def make_rows(tokens: int, vocab_size: int) -> list[torch.Tensor]:
    """Makes rows of random ids, about `tokens` in total."""
    generator = torch.Generator().manual_seed(0)
    rows: list[torch.Tensor] = []
    while sum(map(len, rows)) < tokens:
        length = int(torch.randint(64, 385, (1,), generator=generator))
        rows.append(torch.randint(vocab_size, (length,), generator=generator))
    return rows


def compare(folder: Path, dtype: torch.dtype, tokens: int, rounds: int) -> str:
    """Runs both sides in turn, batch by batch, and formats the result as one line."""
    engine = Engine(folder, dtype=dtype)
    depth = engine.num_layers
    layer_ids = (2, depth // 2, depth - 3)
    rows = make_rows(tokens, engine.facts.vocab_size)
    decoder = engine.model.get_decoder()
    pairs: list[tuple[Seconds, Seconds]] = []
    # The first round warms up. Sides take turns, so that other load on the machine affects both alike.
    for number in range(rounds + 1):
        for indices in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
            batch = [rows[index] for index in indices]
            bare = _seconds(partial(_bare, decoder, batch))
            captured = _seconds(partial(engine.capture, batch, layer_ids))
            if number:
                pairs.append((bare, captured))
    total = rounds * sum(map(len, rows))
    bare_wall, wall = (sum(side[i].wall for side in pairs) for i in (0, 1))
    by_wall, by_cpu = (
        statistics.median(getattr(x, kind) / getattr(y, kind) for x, y in pairs) for kind in Seconds._fields
    )
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name:>9} | bare {total / bare_wall:6.0f} tokens/s | capture {total / wall:6.0f} tokens/s | "
        f"median ratio of {len(pairs)} pairs: {by_wall:.3f} by the clock, {by_cpu:.3f} by processor time"
    )


@torch.no_grad()
def _bare(decoder: Any, batch: list[torch.Tensor]) -> None:
    decoder(input_ids=torch.nn.utils.rnn.pad_sequence(batch, batch_first=True), use_cache=False)


def _seconds(work: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.folder.name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        print(compare(options.folder, dtype, options.tokens, options.rounds), flush=True)


if __name__ == "__main__":
    main()
