"""Tunes K in process: replay gives tau, timed rounds give costs, and the most promising K are decoded for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch

from speculators.bench.context import Benchable, TimedPair, label
from speculators.bench.counts import count_decoded
from speculators.bench.live import Contender, LiveSettings, run_live
from speculators.bench.replay import Replayed, replay_each
from speculators.bench.responses import own_rows, sample_rows
from speculators.bench.rows import JudgedResponse
from speculators.bench.speed import Speed, compare
from speculators.bench.suites import Prompt, load_suite, prompts_digest
from speculators.decoding.loop import Decoded
from speculators.errors import DataError
from speculators.events import Pieces, Progress, ignore
from speculators.recipe.schema import BenchmarkSection
from speculators.tune.costs import CYCLES, time_rounds
from speculators.tune.predict import most_promising, predict
from speculators.tune.result import TuneResult
from speculators.verifier.engine import Engine
from speculators.verifier.weights import load_head

PLAIN = "plain"


def tune_in_process(
    model: Benchable,
    engine: Engine,
    section: BenchmarkSection,
    *,
    name: str,
    k_max: int,
    measured: int = 3,
    cycles: int = CYCLES,
    seed: int = 0,
    timed: TimedPair | None = None,
    progress: Progress = ignore,
) -> TuneResult:
    """Finds the fastest K on the section's first suite and first temperature.

    Args:
        model: the speculator, in evaluation mode, on the engine's device.
        engine: its verifier.
        section: `[benchmark]` of a recipe; `live_prompts` responses are decoded to time rounds and to measure.
        name: the speculator's name in the result.
        k_max: the largest K; every K from 1 is considered.
        measured: number of K to measure by real decoding; 0 trusts the prediction.
        cycles: rounds to time for each K.
        seed: of sampling, of the order of K, and of the intervals.
        timed: verifier and speculator to time; None for `engine` and `model`.
        progress: receives progress events.

    Raises:
        DataError: the suite cannot be loaded, or its responses are too short.
    """
    suite, temperature = section.suites[0], section.temperatures[0]
    prompts = load_suite(suite)
    pieces = Pieces(stage="tune", pieces=4, listen=progress)
    rows = _rows(model, engine, section, prompts, seed=seed, progress=pieces.piece(phases=2))
    ks = range(1, k_max + 1)
    block = section.block_verification
    replayed = replay_each(model, rows, ks, temperature=temperature, block_verification=block, progress=pieces.piece())
    sample = [rows[index] for index in sample_rows(rows, section.live_prompts)]
    if not sample:
        raise DataError(f"suite {suite.name}: no response has two tokens of the verifier's own: nothing to measure")
    pair = timed or TimedPair(model, engine)
    times = time_rounds(
        pair,
        sample,
        k_max=k_max,
        temperature=temperature,
        token_filter=section.token_filter,
        block_verification=block,
        seed=seed,
        cycles=cycles,
        progress=pieces.piece(),
    )
    candidates = predict(replayed, times, seed=seed)
    settings = LiveSettings(
        temperature=temperature,
        token_filter=section.token_filter,
        block_verification=block,
        max_new_tokens=section.max_new_tokens,
        stop_ids=frozenset(engine.stop_ids),
        seed=seed,
        answer_tokens=section.max_new_tokens,
    )
    promising = {k: replayed[k] for k in most_promising(candidates, measured)}
    speeds = _measure(pair, sample, settings, promising, pieces.piece()) if promising else {}
    return TuneResult(
        speculator=name,
        verifier=engine.facts.source,
        device=str(engine.device),
        threads=torch.get_num_threads(),
        dtype=str(pair.engine.dtype).removeprefix("torch."),
        suite=suite.name,
        prompts=len(prompts),
        prompts_digest=prompts_digest(prompts),
        temperature=temperature,
        max_new_tokens=section.max_new_tokens,
        seed=seed,
        plain_seconds=float(times.typical(times.verify)[0]),
        noise=times.noise,
        cycles=len(times.verify),
        candidates=tuple(attrs.evolve(each, measured=speeds.get(each.num_speculative_tokens)) for each in candidates),
    )


def _rows(
    model: Benchable,
    engine: Engine,
    section: BenchmarkSection,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    progress: Progress,
) -> list[JudgedResponse]:
    return own_rows(
        engine,
        load_head(engine.folder, engine.facts).to(engine.device),
        prompts,
        model.draft().target_layer_ids,
        temperature=section.temperatures[0],
        token_filter=section.token_filter,
        max_new_tokens=section.max_new_tokens,
        seed=seed,
        progress=progress,
    )


def _measure(
    pair: TimedPair,
    rows: Sequence[JudgedResponse],
    settings: LiveSettings,
    replayed: Mapping[int, Replayed],
    progress: Progress,
) -> dict[int, Speed]:
    """Decodes each prompt without drafts and with each K of the replays, in turn."""
    contenders = [Contender(PLAIN), *(Contender(label(k), pair.model.draft, k) for k in replayed)]
    decoded = run_live(pair.engine.model, contenders, rows, settings, progress=progress)
    return {
        k: compare(
            _without_prefill(decoded[PLAIN]),
            _without_prefill(decoded[label(k)]),
            tau=count_decoded(decoded[label(k)], k).tau,
            suite_tau=replayed[k].counts(k).tau,
            dtype=str(pair.engine.dtype).removeprefix("torch."),
        )
        for k in replayed
    }


def _without_prefill(responses: Sequence[Decoded]) -> list[Decoded]:
    """Drops the time before the first token, which depends on the prompt's length and which no draft shortens."""
    return [attrs.evolve(each, seconds=each.seconds - each.prefill_seconds) for each in responses]
