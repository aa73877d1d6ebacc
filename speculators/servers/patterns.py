"""Names what the rounds in which a server differs from its prediction have in common, and what to check.

A property is named if all differing rounds have it, and so many rounds drawn at random would have it with a probability
below CHANCE only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import numpy as np

from speculators.servers.audit import DIFFERS, AuditedRound, Pattern

CHANCE = 0.001
# First drafts that may be right by accident where the server drafts other tokens than it should.
ACCIDENTS = 0.05
# Fewer rounds show no pattern.
FEWEST = 5
# Standard errors between the shares of differing rounds in the first and the second half of the positions.
TREND_ERRORS = 4.0

VOCABULARY = "the map from draft ids to tokens (d2t), the draft's head and weights, in the checkpoint that is served"
POSITIONS = "rope_parameters (theta, scaling) and max_position_embeddings of the checkpoint that is served"
INPUTS = "layer ids, rope_parameters, norms and weights of the checkpoint that is served"
PREFILL = "how the server hands the prompt's states and the first token to the draft (chunked prefill, prefix cache)"
DEPTH = "how the draft's own state, token and position pass from one depth to the next"


@attrs.frozen
class _Property:
    what: str
    check: str
    has: Callable[[AuditedRound], bool]


def find_patterns(rounds: Sequence[AuditedRound], num_tokens: int) -> tuple[Pattern, ...]:
    """Lists what the differing rounds have in common, the most telling first; () if there are none.

    Args:
        rounds: all of them.
        num_tokens: K.
    """
    differing = [each for each in rounds if each.verdict == DIFFERS]
    if not differing:
        return ()
    patterns = _never_right(rounds)
    patterns = patterns or [*_shared(rounds, differing), *_one_depth(rounds, differing, num_tokens)]
    patterns = patterns or _growing(rounds, differing) or [_everywhere(rounds, differing)]
    return (*patterns, _direction(differing))


def _never_right(rounds: Sequence[AuditedRound]) -> list[Pattern]:
    expected = [each for each in rounds if each.predicted >= 1]
    right = sum(each.served >= 1 for each in expected)
    if len(expected) < FEWEST or right > ACCIDENTS * len(expected):
        return []
    count = f"{right} of the {len(expected)} first drafts that should be right are accepted"
    return [Pattern(what=f"first drafts are never right: {count}", check=VOCABULARY)]


def _shared(rounds: Sequence[AuditedRound], differing: Sequence[AuditedRound]) -> list[Pattern]:
    """Finds properties of all differing rounds that chance does not explain."""
    named = []
    for one in _properties(differing):
        share = sum(map(one.has, rounds)) / len(rounds)
        if all(map(one.has, differing)) and share ** len(differing) < CHANCE:
            of = sum(map(one.has, rounds))
            named.append(Pattern(what=f"only {one.what}: {len(differing)} of {of} such rounds differ", check=one.check))
    return named


def _properties(differing: Sequence[AuditedRound]) -> list[_Property]:
    first = min(each.position for each in differing)
    prompt = (differing[0].suite, differing[0].prompt)
    return [
        _Property("the first round of an answer", PREFILL, lambda each: each.number == 0),
        _Property("rounds after the first", "how a round updates the draft's cache", lambda each: each.number > 0),
        _Property("prompts with a system turn", "the prompt's ids and the prefix cache", lambda each: each.has_system),
        _Property("prompts without a system turn", "the prompt's ids", lambda each: not each.has_system),
        _Property("later turns", "the prefix cache: the draft's states of a cached prompt", lambda each: each.turn > 0),
        _Property(f"prompt {prompt[1]} of {prompt[0]}", "its ids", lambda each: (each.suite, each.prompt) == prompt),
        _Property(f"after position {first - 1}", POSITIONS, lambda each: each.position >= first),
    ]


def _one_depth(rounds: Sequence[AuditedRound], differing: Sequence[AuditedRound], num_tokens: int) -> list[Pattern]:
    """Tells whether all differ at one depth, where a fault of every depth would show at any that a round judges."""
    depth = differing[0].depth
    judged = np.array([min(each.served + 1, num_tokens) for each in rounds])
    share = float((judged >= depth).sum() / judged.sum())
    if any(each.depth != depth for each in differing) or share ** len(differing) >= CHANCE:
        return []
    what = f"always depth {depth}: {len(differing)} of the {(judged >= depth).sum()} rounds that reach it differ"
    return [Pattern(what=what, check=DEPTH if depth > 1 else INPUTS)]


def _growing(rounds: Sequence[AuditedRound], differing: Sequence[AuditedRound]) -> list[Pattern]:
    """Compares the shares of differing rounds before and after the median position."""
    middle = float(np.median([each.position for each in rounds]))
    halves = [[each for each in rounds if (each.position > middle) == late] for late in (False, True)]
    if min(map(len, halves)) < FEWEST:
        return []
    early, late = (sum(each.verdict == DIFFERS for each in half) / len(half) for half in halves)
    share = len(differing) / len(rounds)
    error = (share * (1 - share) * sum(1 / len(half) for half in halves)) ** 0.5
    if late - early <= TREND_ERRORS * error:
        return []
    what = f"more with the position: {early:.0%} of the rounds up to {middle:.0f} differ, {late:.0%} of those behind"
    return [Pattern(what=what, check=POSITIONS)]


def _everywhere(rounds: Sequence[AuditedRound], differing: Sequence[AuditedRound]) -> Pattern:
    depths = sorted({each.depth for each in differing})
    firsts = sum(each.number == 0 for each in differing)
    where = f"{len(differing)} of {len(rounds)} rounds, {firsts} of them the first of an answer"
    what = f"everywhere, at depth{'s' if len(depths) > 1 else ''} {', '.join(map(str, depths))}: {where}"
    return Pattern(what=f"{what}; the server drafts with something else", check=INPUTS)


def _direction(differing: Sequence[AuditedRound]) -> Pattern:
    fewer = sum(each.served < each.predicted for each in differing)
    what = f"{fewer} of them accept fewer drafts than predicted, {len(differing) - fewer} more"
    return Pattern(what=what, check="")
