"""Times the verifier's answers by our loop against transformers' generate, in turn on the same batch.

python -m benchmarks.perf.generate FOLDER [--prompts 64] [--max-new-tokens 160]

FOLDER is a verifier's Hugging Face folder. Prints tokens/s of both sides (the end-of-turn token is the last that
counts) by the clock and by processor time, their ratio, and how many answers agree token for token. Not all need to:
the products have other batch shapes, so rounding may decide a near tie differently.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

from speculators.data.messages import Message
from speculators.data.template import ChatTemplate
from speculators.recipe.catalog import recipes_folder
from speculators.verifier.engine import Engine

Answers = list[list[int]]


def theirs(engine: Engine, prompts: Answers, new: int) -> Answers:
    """Generates with transformers' own loop, padded on the left."""
    length, stops = max(map(len, prompts)), engine.stop_ids
    ids = torch.tensor([[stops[0]] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(max_new_tokens=new, eos_token_id=list(stops), pad_token_id=stops[0])
    with torch.inference_mode():
        out = engine.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, length:].tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in stops), len(row)) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


def timed(work: Callable[[], Answers]) -> tuple[Answers, float, float]:
    """Runs `work` and returns its answers, wall-clock seconds and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = work()
    return answers, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Prints one line per dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args()
    file = recipes_folder() / "data" / "smollm2_prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // options.prompts)][: options.prompts]
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(options.folder, dtype=dtype)
        template = ChatTemplate.of(engine.tokenizer)
        prompts = [template.prompt_ids(tuple(Message(**turn) for turn in row["messages"])) for row in rows]
        new = options.max_new_tokens
        engine.generate(prompts[:2], max_new_tokens=4)
        a, our_wall, our_cpu = timed(lambda: engine.generate(prompts, max_new_tokens=new, batch_size=len(prompts)))  # noqa: B023
        b, wall, cpu = timed(lambda: theirs(engine, prompts, new))  # noqa: B023
        ours, peers = sum(map(len, a)), sum(map(len, b))
        same = sum(x == y for x, y in zip(a, b, strict=True))
        clock, processor = (ours / x / (peers / y) for x, y in ((our_wall, wall), (our_cpu, cpu)))
        print(
            f"{dtype}: ours {ours / our_wall:,.0f} tokens/s, transformers {peers / wall:,.0f}: "
            f"{clock:.2f}x by the clock, {processor:.2f}x by processor time; {same} of {len(prompts)} answers the same"
        )


if __name__ == "__main__":
    main()
