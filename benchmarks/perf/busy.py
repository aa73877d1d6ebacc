"""Measures training and plain decoding, alone and beside a busy neighbour: one process that never pauses.

    python -m benchmarks.perf.samples quickstart FOLDER
    python -m benchmarks.perf.busy FOLDER [--rounds 3]

"sharing" lets waiting threads sleep as `spec run` does (speculators/cpu.py); "spinning" keeps libgomp's default. All
four cases take turns. benchmarks/README.md defines the figures.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.perf import decode, train_loop
from benchmarks.perf.samples import read_facts
from benchmarks.perf.side_by_side import Side, report, run
from speculators.cpu import sharing_the_cpu
from speculators.nn.precision import compute_dtype
from speculators.verifier.engine import Engine

WORKS = ("train", "decode")
WAYS = ("sharing", "spinning")


def tokens_per_second(work: str, options: argparse.Namespace) -> float:
    """Trains some updates, or decodes some prompts after a first one, and returns the rate."""
    if work == "train":
        return float(train_loop.measure(options.folder, options)["tokens_per_s"])
    torch.set_num_threads(options.threads)
    dtype = compute_dtype(torch.bfloat16, torch.device("cpu"))
    engine = Engine(Path(read_facts(options.folder)["verifier"]), dtype=dtype)
    first, *prompts = decode.suite_prompts(engine, 4)
    answer = decode.ours(engine, 40)
    answer(first)
    began = time.perf_counter()
    tokens = sum(len(answer(prompt)) for prompt in prompts)
    return tokens / (time.perf_counter() - began)


@contextmanager
def neighbour(*, present: bool) -> Any:
    """Runs a process that computes without pause beside the block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if present else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def compare(options: argparse.Namespace) -> None:
    """Runs all cases in turn and prints medians, and the share of the idle speed that is left."""
    rates = defaultdict(list)
    shared = [str(options.folder), "--steps", str(options.steps), "--threads", str(options.threads)]
    for _ in range(options.rounds):
        for work in WORKS:
            for is_busy in (False, True):
                for way in WAYS:
                    command = (sys.executable, "-m", "benchmarks.perf.busy", *shared, "--work", work, "--way", way)
                    with neighbour(present=is_busy):
                        result = run(Side(way, command), threads=options.threads)
                    rates[work, way, is_busy].append(result["tokens_per_s"])
                    print(f"{work}, {way}, {'busy' if is_busy else 'idle'}: {result['tokens_per_s']:.1f} tokens/s")
    print("\n| | idle, tokens/s | with a busy neighbour | share left |\n|---|---|---|---|")
    for work in WORKS:
        for way in WAYS:
            idle, busy = (statistics.median(rates[work, way, is_busy]) for is_busy in (False, True))
            print(f"| {work}, {way} | {idle:,.1f} | {busy:,.1f} | {busy / idle:.2f} |")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by benchmarks.perf.samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", choices=WORKS, help="measure one case in this process")
    parser.add_argument("--way", choices=WAYS, default="sharing")
    options = parser.parse_args()
    if options.work is None:
        compare(options)
        return
    with sharing_the_cpu() if options.way == "sharing" else nullcontext():
        report({"tokens_per_s": tokens_per_second(options.work, options)})


if __name__ == "__main__":
    main()
