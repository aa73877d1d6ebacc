"""Times replay against live decode for the acceptance length at K = 1 to 5: same prompts, one run.

    python -m benchmarks.perf.replay_vs_live SPECULATOR [--verifier FOLDER] [--suite quickstart] [--prompts 16]

SPECULATOR is a folder with config.json and model.safetensors (runs/NAME/speculator). Temperature 0, greedy chains.
benchmarks/README.md defines the figures.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.perf.side_by_side import report
from speculators.bench.counts import count_decoded
from speculators.bench.live import Contender, LiveSettings, run_live
from speculators.bench.replay import replay_each
from speculators.bench.responses import capture_rows, own_rows
from speculators.bench.rows import JudgedResponse, Response
from speculators.bench.suites import load_suite
from speculators.model import SpeculatorModel
from speculators.recipe.schema import Suite
from speculators.verifier.engine import Engine
from speculators.verifier.weights import VerifierHead, load_head


@attrs.frozen(eq=False)
class ReplaySetting:
    """The speculator and verifier that both sides use.

    Attributes:
        head: the verifier's, over its whole vocabulary, in float32.
        depths: the values of K to measure.
    """

    model: Any
    engine: Engine
    head: VerifierHead
    depths: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Timed:
    """The acceptance lengths that one side found, and its time.

    Attributes:
        tau: acceptance length by K.
    """

    tau: dict[int, float]
    seconds: float


def by_replay(setting: ReplaySetting, responses: Sequence[Response]) -> Timed:
    """Times all of replay: states, the check that responses are the verifier's own, one pass for all K if possible."""
    started = time.perf_counter()
    layer_ids = setting.model.draft().target_layer_ids
    rows = capture_rows(setting.engine, setting.head, responses, layer_ids, temperature=0.0)
    replayed = replay_each(setting.model, rows, setting.depths, temperature=0.0)
    tau = {k: replayed[k].counts(k).tau for k in setting.depths}
    return Timed(tau=tau, seconds=time.perf_counter() - started)


def by_decoding(setting: ReplaySetting, rows: Sequence[JudgedResponse], max_new_tokens: int) -> dict[int, Timed]:
    """Decodes every prompt with every K, in turn; the time of a K is summed over its prompts, prefill included."""
    contenders = [Contender(str(k), setting.model.draft, k) for k in setting.depths]
    stop_ids = frozenset(setting.engine.stop_ids)
    live = LiveSettings(temperature=0.0, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    decoded = run_live(setting.engine.model, contenders, rows, live)
    return {
        k: Timed(
            tau=dict.fromkeys((k,), count_decoded(decoded[str(k)], k).tau),
            seconds=sum(response.seconds for response in decoded[str(k)]),
        )
        for k in setting.depths
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs replay, live decode and replay again, and returns the figures; replay's time is the mean of both."""
    torch.set_num_threads(options.threads)
    model = SpeculatorModel.from_pretrained(options.speculator)
    verifier = options.verifier or Path(model.config.speculators_config.verifier.name_or_path)
    engine = Engine(verifier, dtype=options.dtype)
    setting = ReplaySetting(model, engine, load_head(verifier, engine.facts), tuple(range(1, options.k_max + 1)))
    prompts = load_suite(Suite(name=options.suite, path=options.path, split=options.split, take=options.prompts))
    layer_ids, length = model.draft().target_layer_ids, options.max_new_tokens
    started = time.perf_counter()
    rows = own_rows(engine, setting.head, prompts, layer_ids, temperature=0.0, max_new_tokens=length)
    responding = time.perf_counter() - started
    rows = [row for row in rows if len(row.response.answer) > 1]
    responses = [row.response for row in rows]
    by_replay(setting, responses[:2])  # warms up, so that no side pays for one-time work; run_live warms itself up
    first = by_replay(setting, responses)
    lives = by_decoding(setting, rows, length)
    second = by_replay(setting, responses)
    seconds = (first.seconds + second.seconds) / 2
    live_seconds = sum(timed.seconds for timed in lives.values())
    return {
        "speculator": str(options.speculator),
        "verifier": str(verifier),
        "dtype": options.dtype,
        "suite": options.suite,
        "responses": len(rows),
        "tokens": sum(len(row.response.answer) for row in rows),
        "cut_tokens": sum(row.cut for row in rows),
        "responding_seconds": round(responding, 3),
        "replay_seconds": round(seconds, 3),
        "live_seconds": round(live_seconds, 3),
        "live_seconds_by_k": {k: round(timed.seconds, 3) for k, timed in lives.items()},
        "ratio": round(live_seconds / seconds, 1),
        "tau_replay": {k: round(tau, 4) for k, tau in first.tau.items()},
        "tau_live": {k: round(timed.tau[k], 4) for k, timed in lives.items()},
        "threads": options.threads,
        "loadavg": round(os.getloadavg()[0], 2),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speculator", type=Path)
    parser.add_argument(
        "--verifier", type=Path, help="verifier's folder (the one that the speculator's config.json names)"
    )
    parser.add_argument("--suite", default="quickstart")
    parser.add_argument("--path", help="JSONL of a suite that does not come with the package")
    parser.add_argument("--split")
    parser.add_argument("--prompts", type=int, help="only the first N (all)")
    parser.add_argument("--k-max", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    result = measure(options)
    print("| K | tau by replay | tau live | live s |\n|---|---|---|---|")
    for k, live in result["live_seconds_by_k"].items():
        print(f"| {k} | {result['tau_replay'][k]:.4f} | {result['tau_live'][k]:.4f} | {live:.1f} |")
    replay, live = result["replay_seconds"], result["live_seconds"]
    print(f"\nall K: replay {replay:.2f} s, live {live:.1f} s: {result['ratio']:.1f} x")
    report(result)


if __name__ == "__main__":
    main()
