"""The check of replay: what was decoded live, compared with what replay predicts for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import attrs
import torch

from speculators.bench.context import BenchContext, label, tree_label
from speculators.bench.counts import Counts, count_decoded
from speculators.bench.referee import (
    Agreement,
    agree_by_round,
    agree_given_tokens,
    agree_on_both,
    agree_over_prompts,
    but_for_near_ties,
    is_near_tie,
)
from speculators.bench.replay import Replayed, replay, replay_each
from speculators.bench.responses import capture_rows
from speculators.bench.result import Live, summarize
from speculators.bench.rows import JudgedResponse
from speculators.bench.speed import Speed
from speculators.bench.trees import is_replayed, replay_trees
from speculators.decoding.loop import Decoded

# These texts are part of results, which reproduction compares: another wording makes earlier runs differ.
OWN = "live and replay over the verifier's own responses"
SIXTEEN_BIT = "live and replay in 16 bits"
OWN_TOKENS = "the verifier's own tokens; replay does not know these trees"


def check_live(
    context: BenchContext,
    sample: Sequence[JudgedResponse],
    decoded: Mapping[str, Sequence[Decoded]],
    speeds: Mapping[int, Speed],
    temperature: float,
) -> dict[int, Live]:
    """Compares the live decode of the sample with its replay, for each K."""
    ids = tuple(row.response.id for row in sample)
    ks, block = context.section.num_speculative_tokens, context.section.block_verification
    replayed = replay_each(context.model, sample, ks, temperature=temperature, block_verification=block)
    lives = {}
    for k in ks:
        responses = decoded[label(k)]
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


def check_live_trees(
    context: BenchContext,
    sample: Sequence[JudgedResponse],
    decoded: Mapping[str, Sequence[Decoded]],
    speeds: Mapping[str, Speed],
) -> dict[str, Live]:
    """Compares the live decode of the sample with its replay, for each tree that replay knows, at T = 0.

    Of the others, the tokens must be the verifier's own.
    """
    ids = tuple(row.response.id for row in sample)
    k_max, shapes = context.k_max, context.section.tree_shapes
    chain = replay(context.model, sample, k_max=k_max, temperature=0.0)
    known = [shape for shape in shapes if is_replayed(context.model, shape)]
    replayed = replay_trees(context.model, sample, known, chain, k_max=k_max)
    lives = {}
    for shape in shapes:
        responses = decoded[tree_label(shape)]
        measured = count_decoded(responses, shape.depth_within(k_max))
        if shape.name in replayed:
            agreement = _agree_greedy(context, sample, responses, measured, replayed[shape.name])
        else:
            alone = Agreement(criterion=OWN_TOKENS, predicted_tau=math.nan)
            agreement = but_for_near_ties(alone, sample, responses, partial(is_near_tie, context.engine, context.head))
        acceptance = summarize(measured, ids, seed=context.seed)
        lives[shape.name] = Live(acceptance=acceptance, agreement=agreement, speed=speeds[shape.name])
    return lives


def with_timed_answers(
    context: BenchContext, live: Live, whole: Sequence[JudgedResponse], timed: Sequence[Decoded]
) -> Live:
    """Adds, at T = 0, that the answers timed apart are the verifier's own but for near-ties, which it counts."""
    compared = but_for_near_ties(
        live.agreement, whole, timed, partial(is_near_tie, context.engine, context.head, rough=True)
    )
    agreement = attrs.evolve(live.agreement, gap=compared.gap)
    return attrs.evolve(live, agreement=agreement, speed=attrs.evolve(live.speed, near_ties=compared.near_ties))


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
    section = context.section
    own = capture_rows(
        context.engine,
        context.head,
        emitted,
        layer_ids,
        temperature=temperature,
        token_filter=section.token_filter,
        max_new_tokens=section.max_new_tokens,
    )
    k = measured.accepted.shape[1]
    replayed = replay(
        context.model, own, k_max=k, temperature=temperature, block_verification=section.block_verification
    )
    return agree_given_tokens(measured, replayed.acceptance, predicted=replayed.counts(k), level=context.level)
