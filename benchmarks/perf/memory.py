"""Measures peak memory of preparing, capturing and reading conversations against their number (cached mode).

    python benchmarks/perf/memory.py 1000 20000

Each number runs in a process of its own. It writes conversations of about 60 tokens, tokenizes them, makes up states of
1 KB per token (this measures the data path, not a verifier), and reads them through one epoch of packed rows. Memory is
flat if the peaks agree although the store grows with the number.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from speculators.data.batches import Batches
from speculators.data.capture import StateWriter, fill
from speculators.data.prefetch import Prefetcher
from speculators.data.prepare import prepare
from speculators.data.store_layout import StoreLayout
from speculators.recipe.input_sections import DataSection, DataSource
from speculators.verifier.tiny import make_byte_tokenizer

VOCAB, AUX_WIDTH, WIDTH = 320, 384, 128


def write_conversations(path: Path, number: int) -> None:
    """Writes `number` different conversations as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for k in range(number):
            turns = [("user", f"question {k}?"), ("assistant", "word " * (k % 17))]
            messages = [{"role": role, "content": f"{text} {k}"} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def made_up(rows: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (place, [S, AUX_WIDTH], [S, WIDTH]) for each row of ids, in the place of a verifier's states."""
    for place, ids in enumerate(rows):
        states = ids[:, None].float().expand(-1, AUX_WIDTH)
        yield place, states, states[:, :WIDTH]


def measure(number: int, folder: Path) -> dict[str, float]:
    """Takes `number` conversations through the data path in this process and returns its peak memory."""
    start, at_start = time.perf_counter(), memory("VmRSS")
    write_conversations(folder / "rows.jsonl", number)
    section = DataSection(sources=(DataSource(path="./rows.jsonl"),))
    tokenizer = make_byte_tokenizer(VOCAB)
    conversations = prepare(section, folder=folder / "rows", tokenizer=tokenizer, vocab_size=VOCAB, base=folder)
    layout = StoreLayout(
        key="memory", lengths=conversations.lengths, aux_width=AUX_WIDTH, width=WIDTH, dtype="bfloat16"
    )
    writer = StateWriter(folder / "states", layout)
    fill(writer, conversations, made_up)
    shape: dict[str, Any] = {"widths": (AUX_WIDTH, WIDTH), "row_tokens": 2048, "rows_per_step": 2}
    source = writer.finish()
    batches = Batches(conversations=conversations, source=source, seed=0, dtype=torch.bfloat16, **shape)
    steps = batches.steps(0)

    def following(epoch: int, step: int) -> tuple[int, int] | None:
        return (epoch, step + 1) if step + 1 < steps else None

    with Prefetcher(batches, following, torch.device("cpu")) as ahead:
        tokens = sum(row["input_ids"].numel() for step in range(steps) for row in ahead(0, step))
    return {
        "conversations": number,
        "tokens": tokens,
        "store_mb": layout.bytes_for(tokens) / 1e6,
        "start_mb": at_start,
        "peak_mb": memory("VmHWM"),
        "seconds": time.perf_counter() - start,
    }


def memory(field: str) -> float:
    """Reads a field of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


def in_own_process(number: int) -> dict[str, float]:
    """Runs `measure` in a fresh process: VmHWM is the peak of a whole process."""
    done = subprocess.run([sys.executable, __file__, "--here", str(number)], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main(arguments: list[str]) -> None:
    """Prints one line of JSON per number; with `--here N`, measures this process."""
    if arguments[:1] == ["--here"]:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(json.dumps(measure(int(arguments[1]), Path(folder))) + "\n")
        return
    for number in arguments or ["1000", "20000"]:
        sys.stdout.write(json.dumps({k: round(v, 1) for k, v in in_own_process(int(number)).items()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
