"""Checks that the draft reads what it was trained on: layers, tokens, labels, positions, norms and options.

The configured alignment must accept the most drafts. If another one accepts more, beyond chance, it is the diagnosis.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import combinations

import attrs
import numpy as np
import torch
from torch import nn

from speculators.bench.rows import Response
from speculators.doctor.answers import Answers
from speculators.doctor.check import WARNING, Check, Family
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.doctor.trials import Shift, Trial, attempt, compare
from speculators.model import SpeculatorModel

ALIGNMENT = Family("alignment")
# With these limits the comparisons of one examination stay below `trials.COMPARISONS`.
MOST_SWAPS, MOST_OPTIONS = 12, 8
# A misalignment already shows in the first draft, and each further depth costs as much again.
MOST_DEPTHS = 3
# Share of the largest gain. Alternatives above it describe the same fault in other terms (tokens one later and labels
# one earlier: the draft copies its input), so both are reported.
AS_GOOD = 0.95


@attrs.frozen(eq=False)
class Alternative:
    """An alignment other than the configured one.

    Attributes:
        what: short name.
        means: the diagnosis if this alignment is better.
        todo: the remedy in that case.
        run: replays the draft with it.
    """

    what: str
    means: str
    todo: str
    run: Callable[[], Trial]


@attrs.define(eq=False)
class DraftTrials:
    """Replays one speculator on one set of answers."""

    speculator: ExaminedSpeculator
    answers: Answers

    @cached_property
    def configured(self) -> Trial:
        """The trial of the configured alignment, the reference for all others."""
        return self.attempt()

    @property
    def responses(self) -> list[Response]:
        """The answers, in the order of the trials' tables."""
        return [row.response for row in self.answers.rows]

    @property
    def k(self) -> int:
        """Number of depths to replay: as many as a server drafts, up to MOST_DEPTHS."""
        return min(self.speculator.num_tokens, MOST_DEPTHS)

    @property
    def model(self) -> SpeculatorModel:
        """The draft model, which must have loaded."""
        assert self.speculator.model is not None
        return self.speculator.model

    def attempt(self, shift: Shift = Shift(), states: Sequence[torch.Tensor] | None = None) -> Trial:  # noqa: B008
        """Replays the model with an offset, or on other states."""
        return self.attempt_with(self.model, shift, states)

    def attempt_with(
        self,
        model: SpeculatorModel,
        shift: Shift = Shift(),  # noqa: B008  # frozen
        states: Sequence[torch.Tensor] | None = None,
    ) -> Trial:
        """Replays another model of the same algorithm."""
        if states is None:
            states = self.answers.states(self.speculator.layer_ids or ())
        return attempt(model, self.responses, states, self.k, shift)


def check_acceptance(trials: DraftTrials) -> Check:
    """Checks that drafts are accepted more often than a constant guess of the commonest token."""
    configured = trials.configured
    answers = [np.array(row.response.answer[1:]) for row in trials.answers.rows]
    tokens, counts = np.unique(np.concatenate(answers), return_counts=True)
    constant = float(counts.max() / counts.sum())
    figures = (
        f"tau {configured.tau:.3f} for K = {trials.k}; the first draft is accepted at {configured.hits:.1%} of "
        f"{counts.sum():,} places, and always drafting token {tokens[counts.argmax()]} at {constant:.1%}"
    )
    if configured.hits > constant:
        return ALIGNMENT.ok("acceptance", figures)
    todo = (
        "fix whatever else is wrong in this table; if nothing is, the draft was barely trained, or trained on text "
        "that the verifier does not write"
    )
    return ALIGNMENT.wrong("acceptance", f"drafts are accepted no more often than a constant guess: {figures}", todo)


def check_alignment(trials: DraftTrials) -> Iterator[Check]:
    """Yields one check per kind of alignment."""
    groups: tuple[tuple[str, Callable[[DraftTrials], list[Alternative] | str]], ...] = (
        ("layer ids", _layers),
        ("tokens", _tokens),
        ("labels", _labels),
        ("positions", _positions),
        ("verifier's final norm", _verifier_norm),
        ("draft's final norm", _draft_norm),
        ("norms in place", _swaps),
        ("options", _options),
    )
    ranked = []
    for name, others in groups:
        alternatives = others(trials)
        if isinstance(alternatives, str):
            ranked.append(RankedCheck(ALIGNMENT.skipped(name, alternatives)))
        else:
            ranked.append(judge(name, trials.configured, alternatives))
    yield from best_explained(ranked)


@attrs.frozen
class RankedCheck:
    """A check with the gain of the best alternative, in accepted drafts per place; 0 if none is better."""

    check: Check
    gain: float = 0.0


def judge(name: str, configured: Trial, others: Sequence[Alternative]) -> RankedCheck:
    """Tries the alternatives of one kind; the best of those that help beyond chance is the diagnosis."""
    tried = [(other, other.run()) for other in others]
    if all(_unread(trial, configured) for _, trial in tried):
        return RankedCheck(ALIGNMENT.skipped(name, "the draft does not read it: its logits do not change at all"))
    best = sorted(tried, key=lambda pair: -pair[1].tau)[:3]
    taus = ", ".join(f"{other.what} {trial.tau:.3f}" for other, trial in best)
    figures = f"tau as configured {configured.tau:.3f}; {taus}"
    compared = [(compare(configured, trial), other) for other, trial in tried]
    better = [pair for pair in compared if pair[0].better]
    if not better:
        return RankedCheck(ALIGNMENT.ok(name, figures))
    comparison, other = max(better, key=lambda pair: pair[0].gain)
    evidence = f"{other.means}: {figures} (p = {comparison.p:.1g})"
    return RankedCheck(ALIGNMENT.wrong(name, evidence, other.todo), comparison.gain)


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


def _layers(trials: DraftTrials) -> list[Alternative] | str:
    ids = trials.speculator.layer_ids or ()
    if not ids:
        return "the draft does not read the verifier's states"
    others = []
    for step, direction in ((-1, "one earlier"), (1, "one later")):
        moved = tuple(layer + step for layer in ids)
        if min(moved) >= 0 and max(moved) <= trials.answers.num_layers:
            others.append(
                Alternative(
                    what=f"layers {list(moved)}",
                    means=f"the draft was trained on layers {direction} than {list(ids)} (off by one)",
                    todo=f"write {list(moved)} into config.json, or fix the capture and train again: id l is the "
                    "stream entering layer l, id N the last layer's output before the final norm",
                    run=partial(_on_layers, trials, moved),
                )
            )
    return others or f"layers {list(ids)} of {trials.answers.num_layers} cannot be moved: no neighbours"


def _on_layers(trials: DraftTrials, layer_ids: tuple[int, ...]) -> Trial:
    # Concatenated only when tried: all variants at once would take many times the memory.
    return trials.attempt(states=trials.answers.states(layer_ids))


def _tokens(trials: DraftTrials) -> list[Alternative] | str:
    return [
        Alternative(
            what=f"tokens one {direction}",
            means=f"the draft was trained with tokens one place {direction} beside the states (input shift {step:+d})",
            todo="pair the verifier's state at place i with token i + 1, and train again",
            run=partial(trials.attempt, Shift(tokens=step)),
        )
        for step, direction in ((-1, "earlier"), (1, "later"))
    ]


def _labels(trials: DraftTrials) -> list[Alternative] | str:
    return [
        Alternative(
            what=f"labels one {direction}",
            means=f"the draft predicts the token one place {direction} than asked: labels were shifted by {step:+d}",
            todo="make the row that reads token i + 1 predict token i + 2, and train again",
            run=partial(trials.configured.against, trials.responses, step),
        )
        for step, direction in ((-1, "earlier"), (1, "later"))
    ]


def _positions(trials: DraftTrials) -> list[Alternative] | str:
    return [
        Alternative(
            what=f"answer's positions {step:+d}",
            means=f"the draft was trained with the answer's tokens one position {direction}, the prompt's unmoved",
            todo="number the tokens of a document from 0, prompt and answer alike, and train again",
            run=partial(trials.attempt, Shift(positions=step)),
        )
        for step, direction in ((-1, "earlier"), (1, "later"))
    ]


def _verifier_norm(trials: DraftTrials) -> list[Alternative] | str:
    ids, last = trials.speculator.layer_ids or (), trials.answers.num_layers
    if last not in ids:
        return f"layers {list(ids)}: the draft does not read the last layer's output, the only one that a norm follows"

    def run() -> Trial:
        parts = [trials.answers.normed() if layer == last else trials.answers.states((layer,)) for layer in ids]
        return trials.attempt(states=[torch.cat(row, -1) for row in zip(*parts, strict=True)])

    means = "the draft was trained on the last layer's output after the final norm, and now reads it before the norm"
    todo = "capture the last layer's output before the final norm, and train again"
    return [Alternative(what="after the norm", means=means, todo=todo, run=run)]


def _draft_norm(trials: DraftTrials) -> list[Alternative] | str:
    norm = dict(trials.model.named_children()).get("norm")
    if norm is None:
        return "the draft has no final norm of its own"

    def run() -> Trial:
        try:
            trials.model.norm = nn.Identity()
            return trials.attempt()
        finally:
            trials.model.norm = norm

    means = "the draft was trained without its final norm, but config.json gives it one"
    return [Alternative(what="without the norm", means=means, todo="export the norm that training used", run=run)]


def _swaps(trials: DraftTrials) -> list[Alternative] | str:
    norms = {name: one for name, one in trials.model.named_parameters() if name.endswith("norm.weight")}
    pairs = [
        (one, other)
        for one, other in combinations(sorted(norms), 2)
        if _parent(one) == _parent(other)
        and norms[one].shape == norms[other].shape
        and not torch.equal(norms[one], norms[other])
    ]
    if not pairs:
        return "no two norms of one layer have the same size and different values"
    return [
        Alternative(
            what=f"{one} and {other} swapped",
            means=f"{one} and {other} are swapped",
            todo="exchange them in model.safetensors, and check the name rules of the import",
            run=partial(_swapped, trials, norms[one], norms[other]),
        )
        for one, other in pairs[:MOST_SWAPS]
    ]


def _options(trials: DraftTrials) -> list[Alternative] | str:
    config = trials.speculator.config
    assert config is not None
    values = {
        field.name: getattr(config, field.name)
        for field in type(config).recipe_fields()
        if not field.metadata.get("knob")
    }
    flips = {name: not value for name, value in values.items() if isinstance(value, bool)}
    fitting = [(name, value) for name, value in flips.items() if trials.speculator.fits(**{name: value})]
    if not fitting:
        return "the tensors fit only one value of each option in config.json"
    return [
        Alternative(
            what=f"{name} {json.dumps(value)}",
            means=f"the draft was trained with {name} = {json.dumps(value)}, config.json says {json.dumps(not value)}",
            todo=f"write {name} = {json.dumps(value)} into config.json, and check the fields of the import",
            run=partial(_with_option, trials, name, value),
        )
        for name, value in fitting[:MOST_OPTIONS]
    ]


def _with_option(trials: DraftTrials, name: str, value: bool) -> Trial:
    return trials.attempt_with(trials.speculator.with_config(**{name: value}))


def _parent(name: str) -> str:
    return name.rsplit(".", 2)[0] if name.count(".") > 1 else ""


def _swapped(trials: DraftTrials, one: nn.Parameter, other: nn.Parameter) -> Trial:
    with exchanged(one, other):
        return trials.attempt()


@contextmanager
def exchanged(one: nn.Parameter, other: nn.Parameter) -> Iterator[None]:
    """Exchanges the values of two parameters within the block."""
    one.data, other.data = other.data, one.data
    try:
        yield
    finally:
        one.data, other.data = other.data, one.data
