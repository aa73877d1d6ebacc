"""Judges the acceptance itself, beside what needs no training: prompt look-up, a table of token pairs, one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import numpy as np
import torch

from speculators.bench.rows import Response
from speculators.decoding.ngram import NgramDrafter
from speculators.doctor.check import WRONG, Check, Family
from speculators.doctor.trials import DraftTrials, Trial, hits

ALIGNMENT = Family("alignment")
ACCEPTANCE = "acceptance"
TRAIN = "train longer, on more data, or on answers that the verifier itself writes ([data.regenerate])"


@attrs.frozen(eq=False)
class Untrained:
    """What drafting without training accepts on the same places.

    Attributes:
        lookup: drafts the tokens after the last occurrence of the last few.
        pairs: drafts the token that follows most often, counted in the other answers.
        constant: drafts the commonest token of all answers.
    """

    lookup: Trial
    pairs: Trial
    constant: Trial

    @property
    def chance(self) -> float:
        """Accepted drafts per place of what knows nothing of the text so far but its last token."""
        return max(self.pairs.mean, self.constant.mean)


def untrained(responses: Sequence[Response], k: int) -> Untrained:
    """Drafts every place of the answers without a model.

    The table of pairs is counted in all other answers: one that had seen an answer itself would know it by heart.
    """
    counts = [_pairs(response) for response in responses]
    total: Counter[tuple[int, int]] = sum(counts, Counter())
    commonest = Counter(token for response in responses for token in response.answer).most_common(1)[0][0]
    others = [_likeliest(total - own) for own in counts]
    pairs = zip(responses, others, strict=True)
    return Untrained(
        lookup=_trial([_looked_up(response, k) for response in responses]),
        pairs=_trial([_table(one, k, partial(_follow, one, follows, k, commonest)) for one, follows in pairs]),
        constant=_trial([_table(response, k, lambda _: [commonest] * k) for response in responses]),
    )


def _trial(tables: Sequence[np.ndarray]) -> Trial:
    return Trial(tuple(tables), (), torch.empty(0))


def _pairs(response: Response) -> Counter[tuple[int, int]]:
    return Counter(zip(response.answer, response.answer[1:], strict=False))


def _likeliest(counts: Counter[tuple[int, int]]) -> dict[int, int]:
    """Maps each token to the one that follows it most often; the smaller id if two do."""
    ordered = sorted(counts.items(), key=lambda item: (item[1], -item[0][1]))
    return {first: second for (first, second), _ in ordered}


def _follow(response: Response, follows: dict[int, int], k: int, commonest: int, place: int) -> list[int]:
    """Drafts k tokens after a place of the answer from the table, each from the one before."""
    token, drafts = response.answer[place], []
    for _ in range(k):
        token = follows.get(token, commonest)
        drafts.append(token)
    return drafts


def _table(response: Response, k: int, draft: Callable[[int], Sequence[int]]) -> np.ndarray:
    """Marks the drafts after each place of the answer that are right, [L, K]."""
    rows = [list(draft(place))[:k] for place in range(len(response.answer) - 1)]
    padded = [[*row, *[-1] * (k - len(row))] for row in rows]
    return hits(response, torch.tensor(padded, dtype=torch.int64).reshape(-1, k), 0)


def _looked_up(response: Response, k: int) -> np.ndarray:
    drafter, start = NgramDrafter(), response.prompt_length + 1
    state = drafter.begin(torch.tensor(response.tokens[:start]), torch.empty(0))

    def draft(place: int) -> list[int]:
        if place:
            state.append(response.answer[place])
        proposal = drafter.propose(state, num_tokens=k, temperature=0.0, generator=None)
        return [int(token) for token in proposal.tokens]

    return _table(response, k, draft)


def check_acceptance(trials: DraftTrials) -> Check:
    """Checks that the draft accepts more than what needs no training."""
    configured, beside = trials.configured, untrained(trials.responses, trials.k)
    figures = (
        f"tau {configured.tau:.3f} for K = {trials.k}; {configured.hits:.1%} of first drafts accepted at "
        f"{sum(len(table) for table in configured.tables):,} places. Without training: prompt look-up tau "
        f"{beside.lookup.tau:.3f}, a table of token pairs {beside.pairs.tau:.3f}, one token always "
        f"{beside.constant.tau:.3f}"
    )
    if configured.mean <= beside.chance:
        evidence = f"near chance: a table of token pairs, or one token always, is accepted as often: {figures}"
        return ALIGNMENT.wrong(ACCEPTANCE, evidence, TRAIN)
    if configured.tau <= beside.lookup.tau:
        evidence = f"prompt look-up, which needs no training, drafts at least as well: {figures}"
        return ALIGNMENT.warning(ACCEPTANCE, evidence, TRAIN)
    return ALIGNMENT.ok(ACCEPTANCE, figures)


def explained(checks: Sequence[Check]) -> list[Check]:
    """Adds to an acceptance near chance what else is wrong, or that nothing explains it."""
    others = [f"{check.family}/{check.name}" for check in checks if check.result == WRONG and check.name != ACCEPTANCE]
    return [_explained(check, others) if _near_chance(check) else check for check in checks]


def _near_chance(check: Check) -> bool:
    return (check.family, check.name, check.result) == (ALIGNMENT.name, ACCEPTANCE, WRONG)


def _explained(check: Check, others: Sequence[str]) -> Check:
    if others:
        todo = f"fix {', '.join(others)} first, then examine again"
        return attrs.evolve(check, evidence=f"see {', '.join(others)}: {check.evidence}", todo=todo)
    evidence = f"unexplained: no other check fails, and no alternative helps. {check.evidence}"
    todo = (
        "compare the weights with those that were exported or published; if they are the same, the draft was barely "
        f"trained, or trained on text that the verifier does not write: {check.todo}"
    )
    return attrs.evolve(check, evidence=evidence, todo=todo)
