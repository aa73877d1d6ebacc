"""Times decoding at batch 1, greedily: ours, plain and with drafts, against transformers' own ways, in turn.

python -m benchmarks.perf.decode VERIFIER SPECULATOR [--prompts 6] [--max-new-tokens 100] [--k 3 5]
    [--compiled] [--assisted]

VERIFIER is the verifier's Hugging Face folder and SPECULATOR a trained speculator's. Prompts are held-out ones of the
quickstart. All ways take turns on each prompt, so that a slow minute of the machine slows all of them. Prints, for each
dtype, milliseconds a token, prefill included, the speed-up over our plain decoding and over the best plain decoding of
transformers, and how many answers are token for token those of our plain decoding. In float32 all of ours must be. In
bf16 a forward of one token and one of six round differently, and near ties between two tokens fall either way: the
last table says how near they were.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

from speculators.bench.suites import load_suite
from speculators.data.template import ChatTemplate
from speculators.decoding.loop import decode
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.target import CachedVerifier
from speculators.drafter import Drafter
from speculators.model import SpeculatorModel
from speculators.nn.precision import compute_dtype, place
from speculators.recipe.schema import Suite
from speculators.verifier.engine import Engine

Answer = list[int]
Way = Callable[[Answer], Answer]
PLAIN = "ours, plain"
CPU = torch.device("cpu")


def suite_prompts(engine: Engine, count: int) -> list[Answer]:
    """Encodes `count` prompts of the suite, evenly spread over it."""
    prompts, template = load_suite(Suite(name="quickstart")), ChatTemplate.of(engine.tokenizer)
    return [template.prompt_ids(each.messages) for each in prompts[:: max(1, len(prompts) // count)][:count]]


def ours(engine: Engine, new: int, draft: Callable[[], Drafter] | None = None, k: int = 0) -> Way:
    """Decodes with this project's loop."""
    drafter = None if draft is None else draft()
    verifier = CachedVerifier(engine.model, () if drafter is None else drafter.target_layer_ids)

    def run(prompt: Answer) -> Answer:
        drafts = None if draft is None else draft()
        decoded = decode(
            verifier, drafts, torch.tensor(prompt), max_new_tokens=new, num_tokens=k, stop_ids=engine.stop_ids
        )
        return list(decoded.tokens)

    return run


def theirs(engine: Engine, new: int, **options: object) -> Way:
    """Decodes with transformers' `generate`."""
    stops = engine.stop_ids
    config = GenerationConfig(
        max_new_tokens=new, eos_token_id=list(stops), pad_token_id=stops[0], use_cache=True, **options
    )

    def run(prompt: Answer) -> Answer:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = engine.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, tokenizer=engine.tokenizer
            )
        tokens: Answer = out[0, len(prompt) :].tolist()
        return tokens

    return run


def compiled(engine: Engine, new: int) -> Way:
    """Decodes with transformers' `generate`, a static cache and a compiled forward."""
    plain = theirs(engine, new, cache_implementation="static")
    forward = engine.model.forward
    fast = torch.compile(forward)

    def run(prompt: Answer) -> Answer:
        engine.model.forward = fast
        try:
            return plain(prompt)
        finally:
            engine.model.forward = forward

    return run


def ways(engine: Engine, model: SpeculatorModel, options: argparse.Namespace) -> dict[str, Way]:
    """All ways by name, our plain decoding first."""
    new, k = options.max_new_tokens, max(options.k)
    made = {PLAIN: ours(engine, new)}
    made |= {f"ours, speculator, K = {k}": ours(engine, new, model.draft, k) for k in options.k}
    made[f"ours, n-gram, K = {k}"] = ours(engine, new, NgramDrafter, k)
    made["transformers, dynamic cache"] = theirs(engine, new)
    made["transformers, static cache"] = theirs(engine, new, cache_implementation="static")
    if options.compiled:
        made["transformers, static cache, compiled"] = compiled(engine, new)
    made[f"transformers, prompt look-up, K = {k}"] = theirs(engine, new, prompt_lookup_num_tokens=k)
    if options.assisted:
        # SmolLM2 has no smaller model with its tokenizer: its own first layers assist.
        made["transformers, assisted by its own 10 layers"] = theirs(engine, new, assistant_early_exit=10)
    return made


def margins(engine: Engine, prompt: Answer, plain: Answer, other: Answer) -> float | None:
    """The logits' difference between the tokens at which two answers part, by one forward; None if they do not."""
    at = next((place for place, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if at is None:
        return None
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([prompt + plain[:at]])).logits[0, -1].float()
    return float(logits[plain[at]] - logits[other[at]])


def main() -> None:
    """Prints one table per dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier", type=Path)
    parser.add_argument("speculator", type=Path)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--k", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--compiled", action="store_true", help="also transformers' compiled forward; takes minutes")
    parser.add_argument("--assisted", action="store_true", help="also transformers' assisted generation; takes minutes")
    options = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        if compute_dtype(dtype, CPU) != dtype:
            print(f"{dtype}: this CPU computes it in float32")
            continue
        engine = Engine(options.verifier, dtype=dtype)
        model = place(SpeculatorModel.from_pretrained(options.speculator, verifier=options.verifier), CPU, beside=dtype)
        prompts = suite_prompts(engine, options.prompts)
        made = ways(engine, model, options)
        for way in made.values():
            # Caches are built, and a compiled forward is compiled, before time counts.
            way(prompts[0])
        seconds = dict.fromkeys(made, 0.0)
        answers: dict[str, list[Answer]] = {name: [] for name in made}
        for index, prompt in enumerate(prompts):
            for turn in range(len(made)):
                name = list(made)[(index + turn) % len(made)]
                start = time.perf_counter()
                answers[name].append(made[name](prompt))
                seconds[name] += time.perf_counter() - start
        report(engine, prompts, answers, seconds)


def report(engine: Engine, prompts: list[Answer], answers: dict[str, list[Answer]], seconds: dict[str, float]) -> None:
    """Prints the table of one dtype."""
    each = {name: 1000 * seconds[name] / sum(map(len, answers[name])) for name in answers}
    best = min(each[name] for name in each if name.startswith("transformers, ") and " cache" in name)
    print(f"\n{engine.dtype}, {torch.get_num_threads()} threads, {len(prompts)} prompts")
    print("| way | ms a token | against ours, plain | against transformers' best | answers the same |")
    print("|---|---|---|---|---|")
    gaps: list[float] = []
    for name, milliseconds in each.items():
        parts = [margins(engine, *triple) for triple in zip(prompts, answers[PLAIN], answers[name], strict=True)]
        gaps += [part for part in parts if part is not None and name.startswith("ours")]
        same = f"{parts.count(None)} of {len(parts)}"
        print(
            f"| {name} | {milliseconds:.1f} | {each[PLAIN] / milliseconds:.2f} | {best / milliseconds:.2f} | {same} |"
        )
    if gaps:
        print(f"Where ours parted, the two tokens' logits were {min(gaps):.3f} to {max(gaps):.3f} apart.")


if __name__ == "__main__":
    main()
