"""The whole benchmark of one speculator: exact by replay, confirmed live, beside training-free baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol

import attrs
import torch

from speculators.bench.counts import Counts, count_decoded
from speculators.bench.live import Contender, LiveSettings, run_live
from speculators.bench.referee import (
    Agreement,
    agree_by_round,
    agree_given_tokens,
    agree_on_both,
    agree_over_prompts,
    but_for_near_ties,
    is_near_tie,
)
from speculators.bench.replay import Replayed, replay, replay_deterministic, replay_each
from speculators.bench.responses import capture_rows, own_rows, sample_rows
from speculators.bench.result import (
    BaselineRow,
    BenchResult,
    Live,
    Setting,
    definition,
    summarize,
    summarize_categories,
    sums_by_prompt,
    with_drafted_costs,
)
from speculators.bench.rows import JudgedResponse, shortened
from speculators.bench.speed import Speed, compare
from speculators.bench.suites import Prompt, load_suite, prompts_digest
from speculators.decoding.baselines import Baseline, make_baseline
from speculators.decoding.loop import Decoded
from speculators.drafter import Drafter, Replays
from speculators.errors import DataError
from speculators.events import Pieces, Progress, ignore
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.verifier.engine import Engine
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.weights import VerifierHead, load_head

# A correct speculator fails the sampled referee with this probability, over all settings of one benchmark together.
FALSE_ALARM = 0.01
PLAIN = "plain"
# These texts are part of results, which reproduction compares: another wording makes earlier runs differ.
OWN = "live and replay over the verifier's own responses"
SIXTEEN_BIT = "live and replay in 16 bits"
MULTI_TURN = "later turns of a prompt follow the verifier's own answers; the turns of a prompt are resampled together"


# The verifier's own responses by (suite, temperature), made by `own_rows` with the same settings.
KnownRows = Mapping[tuple[str, float], Sequence[JudgedResponse]]


class Benchable(Replays, Protocol):
    """A speculator that can be measured: it replays, and it drafts live."""

    def draft(self) -> Drafter:
        """Makes a drafter that decodes with it."""


@attrs.frozen(eq=False)
class TimedPair:
    """Verifier and speculator in the dtype in which decoding is timed.

    Attributes:
        model: the speculator, in evaluation mode, on the engine's device.
        engine: its verifier.
        baselines: training-free drafters to time beside it.
    """

    model: Benchable
    engine: Engine
    baselines: tuple[Baseline, ...] = ()


@attrs.frozen(eq=False, kw_only=True)
class BenchContext:
    """What every setting of one benchmark shares.

    Attributes:
        head: the verifier's head over its whole vocabulary, in float32.
        level: confidence level of one interval. All sampled settings together agree with probability 1 - FALSE_ALARM or
            more if the speculator is correct.
        pieces: reports the work of all settings as one.
        known_rows: rows that the caller already has.
        baselines: training-free drafters to measure beside it.
        live: whether drafts are decoded live.
        timed: what is timed; None times the live check.
    """

    model: Benchable
    engine: RespondingVerifier
    head: VerifierHead
    section: BenchmarkSection
    seed: int
    level: float
    pieces: Pieces
    known_rows: KnownRows
    baselines: tuple[Baseline, ...]
    live: bool
    timed: TimedPair | None

    @property
    def k_max(self) -> int:
        """The largest K."""
        return max(self.section.num_speculative_tokens)


def bench(
    model: Benchable,
    engine: RespondingVerifier,
    section: BenchmarkSection,
    *,
    name: str,
    seed: int = 0,
    progress: Progress = ignore,
    known_rows: KnownRows = MappingProxyType({}),
    load: Callable[[Suite], Sequence[Prompt]] = load_suite,
    live: bool = True,
    timed: TimedPair | None = None,
) -> BenchResult:
    """Measures a speculator on every suite, temperature and K of the section.

    Args:
        model: the speculator, in evaluation mode, on the engine's device.
        engine: its verifier, an `Engine` if drafts are decoded live. Replay and live are compared round for round where
            it runs in float32.
        section: `[benchmark]` of a recipe.
        name: the speculator's name in the result.
        seed: of sampling and of the bootstrap.
        progress: receives progress events.
        known_rows: rows that the caller already has, which saves the verifier's work.
        load: reads the prompts of a suite.
        live: decode drafts live, and time that; False measures by replay alone.
        timed: verifier and speculator to time; None for `engine` and `model`, in the live check.

    Raises:
        DataError: a suite cannot be loaded, or no response has anything to measure.
    """
    # Above T = 0 two criteria judge a setting. By Bonferroni each may raise a false alarm with an equal share.
    each = sum(2 if temperature > 0 else 1 for temperature in section.temperature)
    criteria = len(section.suites) * each * len(section.num_speculative_tokens)
    # Answers, replay, live decode and what is timed apart, of each suite at each temperature.
    parts = (2 + live + (timed is not None)) * len(section.suites) * len(section.temperature)
    pieces = Pieces(stage="bench", pieces=parts, listen=progress)

    def baselines(engine: RespondingVerifier) -> tuple[Baseline, ...]:
        return tuple(make_baseline(baseline, engine, progress=progress) for baseline in section.baselines)

    context = BenchContext(
        model=model,
        engine=engine,
        head=load_head(engine.folder, engine.facts).to(engine.device),
        section=section,
        seed=seed,
        level=1 - FALSE_ALARM / max(1, criteria),
        pieces=pieces,
        known_rows=known_rows,
        baselines=baselines(engine),
        live=live,
        timed=None if timed is None else attrs.evolve(timed, baselines=baselines(timed.engine)),
    )
    settings: list[Setting] = []
    for suite in section.suites:
        prompts = load(suite)
        for temperature in section.temperature:
            settings += _measure(context, suite.name, prompts, temperature)
    return BenchResult(
        speculator=name,
        verifier=engine.facts.source,
        device=str(engine.device),
        threads=torch.get_num_threads(),
        dtype=str(engine.dtype).removeprefix("torch."),
        seed=seed,
        max_new_tokens=section.max_new_tokens,
        settings=with_drafted_costs(settings),
    )


def _measure(context: BenchContext, suite: str, prompts: Sequence[Prompt], temperature: float) -> list[Setting]:
    """Measures one suite at one temperature; one setting for each K."""
    section, drafter = context.section, context.model.draft()
    answering = context.pieces.piece(phases=2)
    rows = context.known_rows.get((suite, temperature)) or own_rows(
        context.engine,
        context.head,
        prompts,
        drafter.target_layer_ids,
        temperature=temperature,
        max_new_tokens=section.max_new_tokens,
        seed=context.seed,
        progress=answering,
    )
    ks = section.num_speculative_tokens
    replayed = replay_each(context.model, rows, ks, temperature=temperature, progress=context.pieces.piece())
    if not any(len(table) for table in replayed[context.k_max].acceptance):
        raise DataError(
            f"suite {suite}: no response has two tokens of the verifier's own at T={temperature:g}: nothing to measure",
            hint="does the verifier end its turn at once, or is benchmark.max_new_tokens 1?",
        )
    baselines = {each.name: _replay_baseline(each, rows, ks, temperature) for each in context.baselines}
    clock, lives = _live(context, rows, temperature) if context.live else ({}, {})
    note = MULTI_TURN if any(prompt.later for prompt in prompts) else ""
    digest = prompts_digest(prompts)
    settings = []
    for k in ks:
        counts = replayed[k].counts(k)
        settings.append(
            Setting(
                suite=suite,
                prompts_digest=digest,
                num_speculative_tokens=k,
                temperature=temperature,
                definition=definition(k, temperature),
                note=note,
                exact=summarize(counts, replayed[k].ids, seed=context.seed),
                by_category=summarize_categories(replayed[k], counts, seed=context.seed),
                by_prompt=sums_by_prompt(counts, replayed[k].ids),
                baselines=tuple(_baseline(context, name, by_k[k], k, clock) for name, by_k in baselines.items()),
                live=lives.get(k),
                cut_prompts=replayed[k].cut_prompts,
                cut_tokens=replayed[k].cut_tokens,
                replaced_prompts=sum(row.replaced for row in rows),
            )
        )
    return settings


def _live(
    context: BenchContext, rows: Sequence[JudgedResponse], temperature: float
) -> tuple[dict[str, list[Decoded]], dict[int, Live]]:
    """Decodes some of the rows live; returns what was timed, and for each K the comparison with its replay."""
    section, ks = context.section, context.section.num_speculative_tokens
    # What is timed apart is timed over whole answers, for their tokens are not all as easy to draft.
    whole = [rows[index] for index in sample_rows(rows, section.live_prompts)]
    sample = [shortened(row, section.live_tokens) for row in whole]
    decoded, clock = _decode(context, sample, whole, temperature)
    speeds = {k: _speed(context, clock, _label(k), k) for k in ks}
    lives = _referee(context, sample, decoded, speeds, temperature)
    if context.timed is not None and temperature == 0:
        lives = {k: _with_timed_answers(context, live, whole, clock[_label(k)]) for k, live in lives.items()}
    return clock, lives


def _replay_baseline(
    baseline: Baseline, rows: Sequence[JudgedResponse], ks: Sequence[int], temperature: float
) -> dict[int, Replayed]:
    if baseline.replays is not None:
        return replay_each(baseline.replays, rows, ks, temperature=temperature)
    # One pass for each K: a baseline's drafts may depend on how many tokens it may draft.
    return {k: replay_deterministic(baseline.draft, rows, k_max=k) for k in ks}


def _decode(
    context: BenchContext, sample: Sequence[JudgedResponse], whole: Sequence[JudgedResponse], temperature: float
) -> tuple[dict[str, list[Decoded]], dict[str, list[Decoded]]]:
    """Decodes the sample for the live check, and against the clock: by default both are one decode.

    Args:
        sample: rows cut to `live_tokens`.
        whole: the same rows, not cut.
    """
    section, engine = context.section, context.engine
    assert isinstance(engine, Engine), "drafts are decoded live with a verifier in this process"
    settings = LiveSettings(
        temperature=temperature,
        max_new_tokens=section.live_tokens or section.max_new_tokens,
        stop_ids=frozenset(engine.stop_ids),
        seed=context.seed,
        answer_tokens=section.max_new_tokens,
    )

    def run(
        side: TimedPair, rows: Sequence[JudgedResponse], settings: LiveSettings, *, drafting_alone: bool
    ) -> dict[str, list[Decoded]]:
        contenders = [Contender(_label(k), side.model.draft, k) for k in section.num_speculative_tokens]
        if not drafting_alone:
            # Plain decoding, and each baseline at the largest K.
            contenders.insert(0, Contender(PLAIN))
            contenders += [Contender(each.name, each.draft, context.k_max) for each in side.baselines]
        return run_live(side.engine.model, contenders, rows, settings, progress=context.pieces.piece())

    own = TimedPair(context.model, engine, context.baselines)
    if context.timed is None:
        both = run(own, sample, settings, drafting_alone=False)
        return both, both
    checked = run(own, sample, settings, drafting_alone=True)
    longer = attrs.evolve(settings, max_new_tokens=section.max_new_tokens)
    return checked, run(context.timed, whole, longer, drafting_alone=False)


def _referee(
    context: BenchContext,
    sample: Sequence[JudgedResponse],
    decoded: Mapping[str, Sequence[Decoded]],
    speeds: Mapping[int, Speed],
    temperature: float,
) -> dict[int, Live]:
    """Compares the live decode of the sample with its replay, for each K."""
    ids = tuple(row.response.id for row in sample)
    ks = context.section.num_speculative_tokens
    replayed = replay_each(context.model, sample, ks, temperature=temperature)
    lives = {}
    for k in ks:
        responses = decoded[_label(k)]
        measured = count_decoded(responses, k)
        if temperature > 0:
            given_tokens = _agree_given_tokens(context, sample, responses, measured, temperature)
            own = agree_over_prompts(
                measured, predicted=replayed[k].counts(k), groups=ids, level=context.level, what=OWN
            )
            agreement = agree_on_both(given_tokens, own)
        else:
            agreement = _agree_greedy(context, sample, responses, measured, replayed[k])
        lives[k] = Live(acceptance=summarize(measured, ids, seed=context.seed), agreement=agreement, speed=speeds[k])
    return lives


def _with_timed_answers(
    context: BenchContext, live: Live, whole: Sequence[JudgedResponse], timed: Sequence[Decoded]
) -> Live:
    """Adds, at T = 0, that the answers timed apart are the verifier's own but for near-ties, which it counts."""
    compared = but_for_near_ties(
        live.agreement, whole, timed, partial(is_near_tie, context.engine, context.head, rough=True)
    )
    agreement = attrs.evolve(live.agreement, gap=compared.gap)
    return attrs.evolve(live, agreement=agreement, speed=attrs.evolve(live.speed, near_ties=compared.near_ties))


def _speed(context: BenchContext, clock: Mapping[str, Sequence[Decoded]], name: str, k: int) -> Speed:
    return compare(
        clock[PLAIN],
        clock[name],
        tau=count_decoded(clock[name], k).tau,
        dtype=None if context.timed is None else str(context.timed.engine.dtype).removeprefix("torch."),
    )


def _agree_greedy(
    context: BenchContext,
    rows: Sequence[JudgedResponse],
    responses: Sequence[Decoded],
    measured: Counts,
    replayed: Replayed,
) -> Agreement:
    """Compares with the replay of the verifier's own responses, which live must have produced, too."""
    predicted = replayed.counts(measured.accepted.shape[1])
    near_tie = partial(is_near_tie, context.engine, context.head)
    if context.engine.dtype == torch.float32:
        return agree_by_round(rows, responses, replayed.acceptance, predicted=predicted, near_tie=near_tie)
    # In 16 bits the drafts' near-ties are too common to compare round by round; the tokens are compared one by one.
    means = agree_over_prompts(
        measured, predicted=predicted, groups=replayed.ids, level=context.level, what=SIXTEEN_BIT
    )
    return but_for_near_ties(means, rows, responses, near_tie)


def _agree_given_tokens(
    context: BenchContext,
    rows: Sequence[JudgedResponse],
    responses: Sequence[Decoded],
    measured: Counts,
    temperature: float,
) -> Agreement:
    """Replays what live itself emitted: given those tokens, only the acceptance of drafts is left to chance."""
    emitted = [
        attrs.evolve(row.response, tokens=(*row.response.prompt, *response.tokens))
        for row, response in zip(rows, responses, strict=True)
    ]
    layer_ids = context.model.draft().target_layer_ids
    limit = context.section.max_new_tokens
    own = capture_rows(context.engine, context.head, emitted, layer_ids, temperature=temperature, max_new_tokens=limit)
    k = measured.accepted.shape[1]
    replayed = replay(context.model, own, k_max=k, temperature=temperature)
    return agree_given_tokens(measured, replayed.acceptance, predicted=replayed.counts(k), level=context.level)


def _baseline(
    context: BenchContext, name: str, replayed: Replayed, k: int, clock: Mapping[str, Sequence[Decoded]]
) -> BaselineRow:
    acceptance = summarize(replayed.counts(k), replayed.ids, seed=context.seed)
    if k != context.k_max or not context.live:
        return BaselineRow(name=name, acceptance=acceptance)
    tau = count_decoded(clock[name], k).tau
    return BaselineRow(name=name, acceptance=acceptance, live_tau=tau, speed=_speed(context, clock, name, k))


def _label(num_tokens: int) -> str:
    return f"K={num_tokens}"
