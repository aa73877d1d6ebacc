"""The whole benchmark of one speculator: exact by replay, confirmed live, beside training-free baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import attrs
import torch

from speculators.bench.bins import bins_by_context, bins_by_place
from speculators.bench.context import Benchable, BenchContext, KnownRows, TimedPair, label, tree_label
from speculators.bench.counts import Counts, count_decoded
from speculators.bench.live import Contender, LiveSettings, run_live
from speculators.bench.live_check import check_live, check_live_trees, with_timed_answers
from speculators.bench.paired import SumsByPrompt, paired_difference
from speculators.bench.replay import Replayed, or_speculator, replay_deterministic, replay_each
from speculators.bench.responses import own_rows, sample_rows
from speculators.bench.result import (
    BaselineRow,
    BenchResult,
    Live,
    Setting,
    counts_by_prompt,
    definition,
    summarize,
    summarize_categories,
    sums_by_prompt,
    with_drafted_costs,
)
from speculators.bench.rows import JudgedResponse, shortened
from speculators.bench.speed import Speed, compare
from speculators.bench.suites import Prompt, load_suite, prompts_digest
from speculators.bench.tree_rows import check_trees, tree_rows
from speculators.bench.trees import is_replayed, replay_trees
from speculators.cpu import Load
from speculators.decoding.baselines import Baseline, make_baseline
from speculators.decoding.loop import Decoded
from speculators.decoding.trees import TreeDrafter
from speculators.drafter import DraftsTrees
from speculators.errors import DataError
from speculators.events import Pieces, Progress, ignore
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.recipe.tree import TreeShape
from speculators.verifier.engine import Engine
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.weights import load_head

# A correct speculator fails the sampled referee with this probability, over all settings of one benchmark together.
FALSE_ALARM = 0.01
PLAIN = "plain"
# Part of results, as the texts in live_check.py.
MULTI_TURN = "later turns of a prompt follow the verifier's own answers; the turns of a prompt are resampled together"


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
    # Answers, replay, live decode and what is timed apart, of each suite at each temperature.
    parts = (2 + live + (timed is not None)) * len(section.suites) * len(section.temperatures)

    def baselines(engine: RespondingVerifier) -> tuple[Baseline, ...]:
        return tuple(make_baseline(baseline, engine, progress=progress) for baseline in section.baselines)

    if section.trees:
        check_trees(model, engine, section, live=live)
    context = BenchContext(
        model=model,
        engine=engine,
        head=load_head(engine.folder, engine.facts).to(engine.device),
        section=section,
        seed=seed,
        level=_level(section),
        pieces=Pieces(stage="bench", pieces=parts, listen=progress),
        known_rows=known_rows,
        baselines=baselines(engine),
        live=live,
        timed=None if timed is None else attrs.evolve(timed, baselines=baselines(timed.engine)),
    )
    settings: list[Setting] = []
    load_of_others = Load.begin()
    for suite in section.suites:
        prompts = load(suite)
        for temperature in section.temperatures:
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
        others=None if load_of_others is None else load_of_others.of_others(),
    )


def _level(section: BenchmarkSection) -> float:
    """Computes the confidence level of one interval; see `BenchContext`."""
    # Above T = 0 two criteria judge a setting. By Bonferroni each may raise a false alarm with an equal share.
    each = sum(2 if temperature > 0 else 1 for temperature in section.temperatures)
    criteria = len(section.suites) * (each * len(section.num_speculative_tokens) + len(section.trees))
    return 1 - FALSE_ALARM / max(1, criteria)


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
        token_filter=section.token_filter,
        max_new_tokens=section.max_new_tokens,
        seed=context.seed,
        progress=answering,
    )
    ks, block = section.num_speculative_tokens, section.block_verification
    replayed = replay_each(
        context.model,
        rows,
        ks,
        temperature=temperature,
        block_verification=block,
        progress=context.pieces.piece(),
    )
    if not any(len(table) for table in replayed[context.k_max].acceptance):
        raise DataError(
            f"suite {suite}: no response has two tokens of the verifier's own at T={temperature:g}: nothing to measure",
            hint="does the verifier end its turn at once, or is benchmark.max_new_tokens 1?",
        )
    baselines = {each.name: _replay_baseline(context, each, rows, replayed, temperature) for each in context.baselines}
    trees = _replay_trees(context, rows, replayed[context.k_max]) if temperature == 0 else {}
    clock, lives, tree_lives = _live(context, rows, replayed, trees, temperature) if context.live else ({}, {}, {})
    note = MULTI_TURN if any(prompt.later for prompt in prompts) else ""
    digest = prompts_digest(prompts)
    settings = []
    for k in ks:
        counts = replayed[k].counts(k)
        by_prompt = sums_by_prompt(counts, replayed[k].ids)
        settings.append(
            Setting(
                suite=suite,
                prompts_digest=digest,
                num_speculative_tokens=k,
                temperature=temperature,
                definition=definition(k, temperature, section.token_filter, block_verification=block),
                note=note,
                exact=summarize(counts, replayed[k].ids, seed=context.seed),
                by_category=summarize_categories(replayed[k], counts, seed=context.seed),
                by_prompt=by_prompt,
                by_context=bins_by_context(replayed[k], k, seed=context.seed),
                by_place=bins_by_place(replayed[k], k, seed=context.seed),
                counts_by_prompt=counts_by_prompt(counts, replayed[k].ids),
                baselines=tuple(
                    _baseline(context, name, by_k[k], k, clock, by_prompt) for name, by_k in baselines.items()
                ),
                live=lives.get(k),
                cut_prompts=replayed[k].cut_prompts,
                cut_tokens=replayed[k].cut_tokens,
                replaced_prompts=sum(row.replaced for row in rows),
                trees=tree_rows(context, trees, tree_lives) if k == context.k_max and temperature == 0 else (),
            )
        )
    return settings


def _live(
    context: BenchContext,
    rows: Sequence[JudgedResponse],
    replayed: Mapping[int, Replayed],
    trees: Mapping[str, Replayed],
    temperature: float,
) -> tuple[dict[str, list[Decoded]], dict[int, Live], dict[str, Live]]:
    """Decodes some of the rows live; returns what was timed, and for each K and tree the comparison with its replay.

    Args:
        replayed: all rows, by K.
        trees: all rows, by the tree's name, where replay knows it.
    """
    section, ks = context.section, context.section.num_speculative_tokens
    # What is timed apart is timed over whole answers, for their tokens are not all as easy to draft.
    whole = [rows[index] for index in sample_rows(rows, section.live_prompts)]
    sample = [shortened(row, section.live_tokens) for row in whole]
    decoded, clock = _decode(context, sample, whole, temperature)
    speeds = {k: _speed(context, clock, label(k), replayed[k].counts(k)) for k in ks}
    lives = check_live(context, sample, decoded, speeds, temperature)
    if context.timed is not None and temperature == 0:
        lives = {k: with_timed_answers(context, live, whole, clock[label(k)]) for k, live in lives.items()}
    if temperature > 0 or not section.trees:
        return clock, lives, {}
    return clock, lives, _live_trees(context, sample, whole, decoded, clock, trees)


def _live_trees(
    context: BenchContext,
    sample: Sequence[JudgedResponse],
    whole: Sequence[JudgedResponse],
    decoded: Mapping[str, Sequence[Decoded]],
    clock: Mapping[str, Sequence[Decoded]],
    trees: Mapping[str, Replayed],
) -> dict[str, Live]:
    """Compares what was decoded with trees with its replay, by the tree's name."""
    speeds = {}
    for shape in context.section.tree_shapes:
        depth, name = shape.depth_within(context.k_max), tree_label(shape)
        # Without a replay the suite's acceptance length is that of what was timed.
        suite = trees[shape.name].counts(depth) if shape.name in trees else count_decoded(clock[name], depth)
        speeds[shape.name] = _speed(context, clock, name, suite)
    lives = check_live_trees(context, sample, decoded, speeds)
    if context.timed is None:
        return lives
    return {
        shape.name: with_timed_answers(context, lives[shape.name], whole, clock[tree_label(shape)])
        for shape in context.section.tree_shapes
    }


def _replay_trees(context: BenchContext, rows: Sequence[JudgedResponse], chain: Replayed) -> dict[str, Replayed]:
    """Replays the trees that replay knows, by name."""
    shapes = [shape for shape in context.section.tree_shapes if is_replayed(context.model, shape)]
    return replay_trees(context.model, rows, shapes, chain, k_max=context.k_max)


def _replay_baseline(
    context: BenchContext,
    baseline: Baseline,
    rows: Sequence[JudgedResponse],
    speculator: Mapping[int, Replayed],
    temperature: float,
) -> dict[int, Replayed]:
    if baseline.replays is not None:
        block = context.section.block_verification
        return replay_each(baseline.replays, rows, [*speculator], temperature=temperature, block_verification=block)
    # One pass for each K: a baseline's drafts may depend on how many tokens it may draft.
    matched = {k: replay_deterministic(baseline.draft, rows, k_max=k) for k in speculator}
    return {k: or_speculator(matched[k], speculator[k]) for k in matched} if baseline.hybrid else matched


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
        token_filter=section.token_filter,
        block_verification=section.block_verification,
        max_new_tokens=section.live_tokens or section.max_new_tokens,
        stop_ids=frozenset(engine.stop_ids),
        seed=context.seed,
        answer_tokens=section.max_new_tokens,
    )

    def run(
        side: TimedPair, rows: Sequence[JudgedResponse], settings: LiveSettings, *, drafting_alone: bool
    ) -> dict[str, list[Decoded]]:
        contenders = [Contender(label(k), side.model.draft, k) for k in section.num_speculative_tokens]
        if not drafting_alone:
            # Plain decoding, and each baseline at the largest K.
            contenders.insert(0, Contender(PLAIN))
            contenders += [
                Contender(each.name, partial(each.drafter, side.model.draft), context.k_max) for each in side.baselines
            ]
        if temperature == 0:
            contenders += [
                Contender(tree_label(shape), partial(_tree_drafter, side, shape), shape.depth_within(context.k_max))
                for shape in section.tree_shapes
            ]
        return run_live(side.engine.model, contenders, rows, settings, progress=context.pieces.piece())

    own = TimedPair(context.model, engine, context.baselines)
    if context.timed is None:
        both = run(own, sample, settings, drafting_alone=False)
        return both, both
    checked = run(own, sample, settings, drafting_alone=True)
    longer = attrs.evolve(settings, max_new_tokens=section.max_new_tokens)
    return checked, run(context.timed, whole, longer, drafting_alone=False)


def _tree_drafter(side: TimedPair, shape: TreeShape) -> TreeDrafter:
    drafter = side.model.draft()
    assert isinstance(drafter, DraftsTrees), "check_trees has asked"
    return TreeDrafter(drafter, shape)


def _speed(context: BenchContext, clock: Mapping[str, Sequence[Decoded]], name: str, suite: Counts) -> Speed:
    return compare(
        clock[PLAIN],
        clock[name],
        tau=count_decoded(clock[name], suite.accepted.shape[1]).tau,
        suite_tau=suite.tau,
        dtype=None if context.timed is None else str(context.timed.engine.dtype).removeprefix("torch."),
    )


def _baseline(
    context: BenchContext,
    name: str,
    replayed: Replayed,
    k: int,
    clock: Mapping[str, Sequence[Decoded]],
    speculator: SumsByPrompt,
) -> BaselineRow:
    counts = replayed.counts(k)
    row = BaselineRow(
        name=name,
        acceptance=summarize(counts, replayed.ids, seed=context.seed),
        counts_by_prompt=counts_by_prompt(counts, replayed.ids),
        difference=paired_difference(sums_by_prompt(counts, replayed.ids), speculator, seed=context.seed),
    )
    if k != context.k_max or not context.live:
        return row
    speed = _speed(context, clock, name, counts)
    return attrs.evolve(row, live_tau=speed.tau, speed=speed)
