"""Checks that the draft reads what it was trained on, and that its weights are where they were.

The configured alignment must accept the most drafts. If another one accepts more, beyond chance, it is the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import numpy as np
import torch

from speculators.doctor import borrowed, heads, inputs, weights
from speculators.doctor.acceptance import untrained
from speculators.doctor.alternative import Alternative, Alternatives
from speculators.doctor.check import WARNING, Check, Family
from speculators.doctor.effort import LEFT_OUT, Effort
from speculators.doctor.paired import TrialComparison, compare, level_weights, significant
from speculators.doctor.trials import DraftTrials, Trial
from speculators.events import Listen, ProgressEvent, ignore

ALIGNMENT = Family("alignment")
Kind = Callable[[DraftTrials], Alternatives]
KINDS: dict[str, Kind] = {
    "layer ids": inputs.layers,
    "order of states": inputs.order,
    "tokens": inputs.tokens,
    "labels": inputs.labels,
    "positions": inputs.positions,
    "verifier's final norm": inputs.verifier_norm,
    "draft's final norm": inputs.draft_norm,
    "norms in place": weights.norms_in_place,
    "norm convention": weights.norm_convention,
    "projections": weights.projections,
    "concatenated inputs": weights.concatenated,
    "order of layers": weights.order_of_layers,
    "rotary layout": heads.rotary_layout,
    "heads": heads.head_grouping,
    "head and embeddings": borrowed.head_and_embeddings,
    "draft vocabulary": borrowed.draft_vocabulary,
    "number format": borrowed.number_format,
    "options": inputs.options,
}
# The commonest faults of the field, with few alternatives each: a quick examination tries these.
QUICK_KINDS = {
    "layer ids", "tokens", "labels", "positions", "norms in place", "projections", "rotary layout", "options"
}  # fmt: skip
# Share of the largest gain. Alternatives above it describe the same fault in other terms (tokens one later and labels
# one earlier: the draft copies its input), so both are reported.
AS_GOOD = 0.95
# Standard errors, over places of the sample, that make an alternative so much worse that more answers cannot help it.
HOPELESS = 4.0
# A draft near chance is explained by an alternative that accepts at least so many times as much as chance.
CURE = 2.0


@attrs.frozen(eq=False)
class Candidate:
    """An alternative on its way through the examination.

    Attributes:
        kind: name of its check.
        alternative: what is tried.
        sampled: its first drafts of the first answers.
        trial: its full trial; None if the sample sufficed.
        comparison: with the configured trial; None without a full trial.
        significant: whether it is better at the level of all alternatives together.
        explains: whether its drafts are well above chance, where the configured ones are near it.
    """

    kind: str
    alternative: Alternative
    sampled: Trial
    trial: Trial | None = None
    comparison: TrialComparison | None = None
    significant: bool = False
    explains: bool = True

    @property
    def better(self) -> bool:
        """Whether it is a finding."""
        return self.significant and self.gain > 0

    @property
    def gain(self) -> float:
        """Accepted drafts per place that it adds; 0 without a full trial."""
        return 0.0 if self.comparison is None else self.comparison.gain


def check_alignment(trials: DraftTrials, effort: Effort, listen: Listen = ignore) -> Iterator[Check]:
    """Yields one check per kind of alternative.

    Each alternative first replays one draft per place of a few answers; those that are clearly worse are dropped. Only
    the best of the rest, and the commonest faults, replay all answers. Dropping cannot raise a false alarm, since the
    level counts all of them.

    Args:
        trials: of the speculator.
        effort: size of the sample, and number of alternatives that replay all answers.
        listen: receives progress.
    """
    small = trials.sample(effort.sample)
    kinds = {kind: make for kind, make in KINDS.items() if effort.thorough or kind in QUICK_KINDS}
    checks, candidates = _sampled(trials, small, kinds, listen)
    checks |= {kind: ALIGNMENT.skipped(kind, LEFT_OUT) for kind in KINDS if kind not in kinds}
    tried = _tried(trials, candidates, promising(small.configured, candidates, effort.keep), listen)
    ranked = {kind: RankedCheck(check) for kind, check in checks.items()}
    for kind in KINDS:
        if of_kind := [one for one in tried if one.kind == kind]:
            ranked[kind] = judge(kind, of_kind, (small.configured, trials.configured), len(tried))
    yield from best_explained([ranked[kind] for kind in KINDS])


def _sampled(
    trials: DraftTrials, small: DraftTrials, kinds: Mapping[str, Kind], listen: Listen
) -> tuple[dict[str, Check], list[Candidate]]:
    """Replays a sample with every alternative; kinds without any become skipped checks."""
    groups = {kind: make(trials) for kind, make in kinds.items()}
    total = sum(len(others) for others in groups.values() if not isinstance(others, str))
    checks: dict[str, Check] = {}
    candidates: list[Candidate] = []
    for kind, others in groups.items():
        if isinstance(others, str):
            checks[kind] = ALIGNMENT.skipped(kind, others)
            continue
        of_kind = []
        for other in others:
            of_kind.append(Candidate(kind, other, other.run(small)))
            done = len(candidates) + len(of_kind)
            listen(ProgressEvent(stage="alignment", done=done, total=total, unit="alternatives", note="sample"))
        if all(_unread(one.sampled, small.configured) for one in of_kind):
            checks[kind] = ALIGNMENT.skipped(kind, "the draft does not read it: its logits do not change at all")
        candidates += of_kind
    return checks, [one for one in candidates if one.kind not in checks]


def _tried(
    trials: DraftTrials, candidates: Sequence[Candidate], chosen: Sequence[int], listen: Listen
) -> list[Candidate]:
    """Replays all answers with the chosen alternatives, and marks those that are significantly better."""
    tried = list(candidates)
    for done, index in enumerate(chosen, start=1):
        trial = candidates[index].alternative.run(trials)
        compared = compare(trials.configured, trial)
        tried[index] = attrs.evolve(candidates[index], trial=trial, comparison=compared)
        listen(ProgressEvent(stage="alignment", done=done, total=len(chosen), unit="alternatives", note="all answers"))
    least = _least(trials)
    chances = [1.0 if one.comparison is None else one.comparison.p for one in tried]
    marks = significant(chances, level_weights([one.alternative.common for one in tried]))
    explains = [one.trial is None or one.trial.mean >= least for one in tried]
    return [
        attrs.evolve(one, significant=mark and lifts, explains=lifts)
        for one, mark, lifts in zip(tried, marks, explains, strict=True)
    ]


def _least(trials: DraftTrials) -> float:
    """Accepted drafts per place that a finding must reach.

    Whatever weakens a part that is broken helps a draft near chance a little, without being the fault.
    """
    chance = untrained(trials.responses, trials.k).chance
    return CURE * chance if trials.configured.mean <= chance else 0.0


def promising(configured: Trial, candidates: Sequence[Candidate], keep: int) -> list[int]:
    """Indices of the common candidates, and of at most `keep` others that may still be better, the best first."""
    gains, common = [], []
    for index, one in enumerate(candidates):
        if one.alternative.common:
            common.append(index)
            continue
        comparable = configured if one.sampled.ranks else attrs.evolve(configured, ranks=())
        difference = one.sampled.first_scores - comparable.first_scores
        if difference.sum() >= -HOPELESS * np.sqrt((difference**2).sum()) and not _unread(one.sampled, configured):
            gains.append((float(difference.sum()), index))
    return common + [index for _, index in sorted(gains, key=lambda pair: -pair[0])[:keep]]


@attrs.frozen
class RankedCheck:
    """A check with the gain of the best alternative, in accepted drafts per place; 0 if none is better."""

    check: Check
    gain: float = 0.0


def judge(kind: str, tried: Sequence[Candidate], configured: tuple[Trial, Trial], count: int) -> RankedCheck:
    """Reports the best alternative of a kind: as the diagnosis, if it helps beyond chance.

    Args:
        kind: name of the check.
        tried: the alternatives of this kind.
        configured: the configured trials of the sample and of all answers.
        count: number of alternatives of all kinds.
    """
    sample, whole = configured
    best = _diagnosis(tried)
    if best.comparison is None or best.trial is None:
        figures = f"first drafts accepted in {len(sample.tables)} answers: {sample.hits:.1%} as configured, "
        return RankedCheck(ALIGNMENT.ok(kind, f"{figures}{best.sampled.hits:.1%} with {_best(best, tried)}"))
    figures = (
        f"tau {whole.tau:.3f} as configured, {best.trial.tau:.3f} with {_best(best, tried)}; {best.comparison.size}"
    )
    if not best.better:
        return RankedCheck(_suspected(kind, tried, whole, count) or ALIGNMENT.ok(kind, figures))
    evidence = f"{best.alternative.means}: {figures}; p = {best.comparison.p:.1g}, with {count} alternatives tried"
    return RankedCheck(ALIGNMENT.wrong(kind, evidence, best.alternative.todo), best.gain)


def _diagnosis(tried: Sequence[Candidate]) -> Candidate:
    """Chooses the best alternative, or a commonest fault that is not clearly worse."""
    best = max(tried, key=lambda one: (one.better, one.comparison is not None, one.gain, one.sampled.hits))
    for one in tried:
        if not (one.alternative.common and one.better and one.trial and best.trial):
            continue
        if not compare(one.trial, best.trial).better:
            return one
    return best


def _suspected(kind: str, tried: Sequence[Candidate], whole: Trial, count: int) -> Check | None:
    """Warns of the likeliest alternative that these answers suggest but cannot prove; None if there is none."""
    likely = [
        (one.comparison.p, one.alternative, one.trial, one.comparison)
        for one in tried
        if one.explains
        and one.trial
        and one.comparison
        and one.comparison.suspicious(1 if one.alternative.common else count)
    ]
    if not likely:
        return None
    p, alternative, trial, comparison = min(likely, key=lambda each: each[0])
    evidence = (
        f"perhaps {alternative.means}: tau {whole.tau:.3f} as configured, {trial.tau:.3f} with {alternative.what}; "
        f"{comparison.size}; p = {p:.1g}, too few answers to be sure"
    )
    again = "examine again without --quick, or on other prompts (--prompts FILE)"
    todo = f"{again}; if the warning stays: {alternative.todo}"
    return ALIGNMENT.warning(kind, evidence, todo)


def _best(best: Candidate, tried: Sequence[Candidate]) -> str:
    return f"{best.alternative.what} (best of {len(tried)})" if len(tried) > 1 else best.alternative.what


def best_explained(ranked: Sequence[RankedCheck]) -> Iterator[Check]:
    """Yields the checks, keeping the largest gain as the diagnosis.

    One fault can improve several alignments; the lesser gains become warnings that name the diagnosis.
    """
    most = max(ranked, key=lambda ranked_check: ranked_check.gain)
    for ranked_check in ranked:
        check = ranked_check.check
        if 0 < ranked_check.gain < AS_GOOD * most.gain:
            evidence = f"also better than configured, but {most.check.name} explain more: {check.evidence}"
            todo = f"fix {most.check.name} first, then examine again"
            check = attrs.evolve(check, result=WARNING, evidence=evidence, todo=todo)
        yield check


def _unread(trial: Trial, configured: Trial) -> bool:
    """Whether the changed input left the drafts as they were; a trial of other labels re-uses the configured drafts."""
    replayed = trial.first is not configured.first
    return replayed and torch.equal(trial.first, configured.first) and _same(trial, configured)


def _same(one: Trial, other: Trial) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.drafts, other.drafts, strict=True))
