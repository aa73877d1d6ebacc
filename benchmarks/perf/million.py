"""Measures the data path by the number of conversations: prepare, packing, and the time to the first batch.

python -m benchmarks.perf.million VERIFIER FOLDER 1000 10000 100000
python -m benchmarks.perf.million VERIFIER FOLDER 1000000 --repeat 100000 --part states --part epoch

VERIFIER is a Hugging Face folder, of which only the tokenizer is used. Conversations have two turns of made-up text, 60
to 120 tokens together; states of 12 bytes per token are made up, too. Each part runs in a process of its own and prints
one line of JSON. FOLDER keeps the files, so a part can be run again by itself (`--part epoch`). `--repeat` repeats the
prepared conversations of a smaller number, where tokenizing all would take too long.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.perf.memory import memory
from speculators.data import encoded as names
from speculators.data.batches import Batches
from speculators.data.capture import StateWriter, fill
from speculators.data.encoded import Conversations
from speculators.data.prepare import prepare
from speculators.data.store import StateStore
from speculators.data.store_layout import StoreLayout, shard_tokens_for, store_bytes
from speculators.files.folders import seal, whole_folder
from speculators.recipe.catalog import recipes_folder
from speculators.recipe.input_sections import DataSection, DataSource
from speculators.verifier.tokens import load_tokenizer

AUX_WIDTH, WIDTH, DTYPE = 4, 2, "bfloat16"
ROW_TOKENS, ROWS_PER_STEP = 2048, 4
# Steps that are read to measure the cost of a token: rows of the whole store, in the epoch's order.
STEPS = 100

Figures = dict[str, float]


def write_conversations(path: Path, number: int) -> None:
    """Writes conversations of the quickstart's words in another order each."""
    rows = (recipes_folder() / "data" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    lexicon = [word for row in rows for turn in json.loads(row)["messages"] for word in turn["content"].split()]
    with path.open("w", encoding="utf-8") as file:
        for k in range(number):
            draw = random.Random(k)
            texts = []
            for fewest, most in ((8, 16), (12, 40)):
                start, count = draw.randrange(len(lexicon) - most), draw.randint(fewest, most)
                texts.append(" ".join(lexicon[start : start + count]))
            turns = zip(("user", "assistant"), texts, strict=True)
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"id": f"conversation-{k}", "messages": messages}) + "\n")


def repeat_prepared(smaller: Path, folder: Path, times: int) -> None:
    """Writes the folder that `prepare` would write for conversations that are there several times."""
    one = Conversations.open(smaller)
    with whole_folder(folder) as partial_folder:
        for name in (names.TOKENS, names.MASK):
            with (smaller / name).open("rb") as source, (partial_folder / name).open("wb") as file:
                for _ in range(times):
                    source.seek(0)
                    shutil.copyfileobj(source, file)
        ends = np.cumsum(np.tile(one.lengths, times))
        np.save(partial_folder / names.OFFSETS, np.append(0, ends))
        np.save(partial_folder / names.SUPERVISED, np.tile(one.supervised, times))
        np.save(partial_folder / names.COUNTS, one.token_counts() * times)
        repeated = (f"{name}-{time}" for time in range(times) for name in one.ids())
        (partial_folder / names.IDS).write_text("\n".join(repeated), encoding="utf-8")
        facts = {key: value for key, value in one.manifest.items() if key not in ("files", "format")}
        seal(partial_folder, {**facts, "conversations": one.conversations * times})


def make_input(folder: Path, number: int, repeat: int | None) -> None:
    """Makes what the first part reads, unless it is there: rows, or with `repeat` what was prepared of so many."""
    rows, prepared = folder / "rows.jsonl", folder / "prepared"
    if repeat is None and not rows.exists():
        write_conversations(rows, number)
    elif repeat is not None and not prepared.exists():
        repeat_prepared(folder.with_name(str(repeat)) / "prepared", prepared, number // repeat)


def measure_prepare(folder: Path, verifier: Path) -> Figures:
    """Tokenizes; processor time is that of all processes, and memory that of the largest."""
    source = folder / "rows.jsonl"
    tokenizer, section = load_tokenizer(verifier), DataSection(sources=(DataSource(path=str(source)),))
    start, began = memory("VmRSS"), _processor_seconds()
    clock = time.perf_counter()
    prepared = prepare(section, folder=folder / "prepared", tokenizer=tokenizer, vocab_size=len(tokenizer), base=folder)
    tokens, seconds = int(prepared.lengths.sum()), time.perf_counter() - clock
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_core_second": tokens / (_processor_seconds() - began),
        "start_mb": start,
        "peak_mb": memory("VmHWM"),
        "child_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
    }


def measure_states(folder: Path) -> Figures:
    """Writes the store."""
    conversations = Conversations.open(folder / "prepared")
    sizes: dict[str, Any] = {"aux_width": AUX_WIDTH, "width": WIDTH}
    tokens, row_bytes = int(conversations.lengths.sum()), store_bytes(1, **sizes, dtype=DTYPE)
    shard_tokens = shard_tokens_for(tokens, row_bytes, at_least=8192)
    start, began = memory("VmRSS"), _processor_seconds()
    layout = StoreLayout(key="million", lengths=conversations.lengths, **sizes, dtype=DTYPE, shard_tokens=shard_tokens)
    writer = StateWriter(folder / "states", layout)
    fill(writer, conversations, _made_up)
    writer.finish()
    cost = (_processor_seconds() - began) / tokens
    return {"shards": len(layout.shards), "us_per_token": 1e6 * cost, "start_mb": start, "peak_mb": memory("VmHWM")}


def measure_epoch(folder: Path) -> Figures:
    """Opens what was prepared as one rank of training does, and reads its first batches."""
    start, clock = memory("VmRSS"), time.perf_counter()
    conversations = Conversations.open(folder / "prepared")
    source = StateStore.open(folder / "states", check="none")
    opened = time.perf_counter()
    batches = Batches(
        conversations=conversations,
        source=source,
        widths=(AUX_WIDTH, WIDTH),
        row_tokens=ROW_TOKENS,
        rows_per_step=ROWS_PER_STEP,
        seed=0,
        dtype=torch.bfloat16,
    )
    steps = batches.steps(0)
    packed = time.perf_counter()
    batches(0, 0)
    first = time.perf_counter()
    places = np.linspace(0, steps - 1, min(steps, STEPS)).astype(int)
    costs = [_read_cost(batches, ((places + turn) % steps).tolist()) for turn in (0, 1)]
    return {
        "open_s": opened - clock,
        "pack_s": packed - opened,
        "first_batch_s": first - clock,
        "first_us_per_token": costs[0],
        "us_per_token": costs[1],
        "start_mb": start,
        "now_mb": memory("VmRSS"),
        "peak_mb": memory("VmHWM"),
    }


def _read_cost(batches: Batches, steps: list[int]) -> float:
    began = _processor_seconds()
    tokens = sum(row["input_ids"].numel() for step in steps for row in batches(0, step))
    return 1e6 * (_processor_seconds() - began) / tokens


def _made_up(rows: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for place, ids in enumerate(rows):
        states = ids[:, None].float().expand(-1, AUX_WIDTH)
        yield place, states, states[:, :WIDTH]


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Prints one line of JSON per part and number; with `--here`, measures one part in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("numbers", type=int, nargs="+")
    parser.add_argument("--part", choices=("prepare", "states", "epoch"), action="append")
    parser.add_argument("--repeat", type=int)
    parser.add_argument("--here", action="store_true")
    options = parser.parse_args()
    for number in options.numbers:
        folder = options.folder / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        if not options.here:
            make_input(folder, number, options.repeat)
        parts: dict[str, Callable[[], Figures]] = {
            "prepare": partial(measure_prepare, folder, options.verifier),
            "states": partial(measure_states, folder),
            "epoch": partial(measure_epoch, folder),
        }
        for part in options.part or parts:
            if options.here:
                figures = parts[part]()
                print(
                    json.dumps({"part": part, "conversations": number} | {k: round(v, 2) for k, v in figures.items()})
                )
            else:
                command = ["-m", "benchmarks.perf.million", options.verifier, options.folder, str(number)]
                subprocess.run([sys.executable, *command, "--part", part, "--here"], check=True)


if __name__ == "__main__":
    main()
