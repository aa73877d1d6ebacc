"""Is the draft given what it was trained on: layers, tokens, labels, positions, norms moved by one, options flipped.

What is configured must accept the most. Where another alignment accepts more, beyond chance, that is the diagnosis.
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
from speculators.doctor.subject import Patient
from speculators.doctor.trials import Change, Comparison, Trial, attempt, compare
from speculators.model import SpeculatorModel

ALIGNMENT = Family("alignment")
# Swaps and options that are tried; with the other comparisons they stay below `trials.COMPARISONS`.
MOST_SWAPS, MOST_OPTIONS = 12, 8
# A misalignment shows in the first draft already; deeper ones cost as much each.
MOST_DEPTHS = 3
# Of the largest gain: what gains as much is the same fault in other words (tokens one later, labels one earlier: the
# draft copies what it reads), and both are told.
AS_GOOD = 0.95


@attrs.frozen(eq=False)
class Other:
    """Another alignment than the configured one.

    Attributes:
        what: it is, in a few words.
        means: what it means if this one is better.
        todo: then.
        run: tries it.
    """

    what: str
    means: str
    todo: str
    run: Callable[[], Trial]


@attrs.define(eq=False)
class Bench:
    """What all trials of one patient share."""

    patient: Patient
    answers: Answers

    @cached_property
    def configured(self) -> Trial:
        """The trial of what is configured, with which all others are compared."""
        return self.attempt()

    @property
    def responses(self) -> list[Response]:
        """The answers."""
        return [row.response for row in self.answers.rows]

    @property
    def k(self) -> int:
        """Depths that are tried: as many as a server drafts, and as tell a misalignment."""
        return min(self.patient.num_tokens, MOST_DEPTHS)

    @property
    def model(self) -> SpeculatorModel:
        """The draft."""
        assert self.patient.model is not None
        return self.patient.model

    def attempt(self, change: Change = Change(), states: Sequence[torch.Tensor] | None = None) -> Trial:  # noqa: B008
        """Tries the model with a change, or on other states."""
        return self.attempt_with(self.model, change, states)

    def attempt_with(
        self,
        model: SpeculatorModel,
        change: Change = Change(),  # noqa: B008  # frozen
        states: Sequence[torch.Tensor] | None = None,
    ) -> Trial:
        """Tries another model of the same algorithm."""
        given = self.answers.states(self.patient.layer_ids or ()) if states is None else states
        return attempt(model, self.responses, given, self.k, change)


def check_acceptance(bench: Bench) -> Check:
    """Tells whether drafts are accepted at all: more often than always drafting the commonest token would be."""
    configured = bench.configured
    answers = [np.array(row.response.answer[1:]) for row in bench.answers.rows]
    tokens, counts = np.unique(np.concatenate(answers), return_counts=True)
    constant = float(counts.max() / counts.sum())
    figures = (
        f"tau {configured.tau:.3f} for K = {bench.k}; the first draft is accepted at {configured.hits:.1%} of "
        f"{counts.sum():,} places, token {tokens[counts.argmax()]} alone would be at {constant:.1%}"
    )
    if configured.hits > constant:
        return ALIGNMENT.ok("acceptance", figures)
    todo = "see what else is wrong here; if nothing is, it was hardly trained, or on other text than the verifier's"
    return ALIGNMENT.wrong("acceptance", f"drafts are accepted no more often than a constant would be: {figures}", todo)


def check_alignment(bench: Bench) -> Iterator[Check]:
    """Yields a check for each kind of alignment."""
    groups: tuple[tuple[str, Callable[[Bench], list[Other] | str]], ...] = (
        ("layer ids", _layers),
        ("tokens", _tokens),
        ("labels", _labels),
        ("positions", _positions),
        ("verifier's final norm", _verifier_norm),
        ("draft's final norm", _draft_norm),
        ("norms in place", _swaps),
        ("options", _options),
    )
    verdicts = []
    for name, others in groups:
        found = others(bench)
        verdicts.append(
            Verdict(ALIGNMENT.skipped(name, found)) if isinstance(found, str) else judge(name, bench.configured, found)
        )
    yield from best_explained(verdicts)


@attrs.frozen
class Verdict:
    """A check, and by how many accepted drafts a place the other alignment is better, 0 where none is."""

    check: Check
    gain: float = 0.0


def judge(name: str, configured: Trial, others: Sequence[Other]) -> Verdict:
    """Returns the check of one kind: the best of the others that is better beyond chance is the diagnosis."""
    tried = [(other, other.run()) for other in others]
    if all(_unread(trial, configured) for _, trial in tried):
        return Verdict(ALIGNMENT.skipped(name, "the draft does not read it: its logits stay the same to the bit"))
    told = ", ".join(f"{other.what} {trial.tau:.3f}" for other, trial in sorted(tried, key=lambda one: -one[1].tau)[:3])
    figures = f"tau as configured {configured.tau:.3f}; {told}"
    compared = [(compare(configured, trial), other) for other, trial in tried]
    better = [pair for pair in compared if pair[0].better]
    if not better:
        return Verdict(ALIGNMENT.ok(name, figures))
    found, other = max(better, key=lambda pair: pair[0].gain)
    return Verdict(ALIGNMENT.wrong(name, f"{other.means}: {figures} {chance(found)}", other.todo), found.gain)


def best_explained(verdicts: Sequence[Verdict]) -> Iterator[Check]:
    """Yields the checks; one fault can make several alignments better, and the one that gains most is the diagnosis."""
    most = max(verdicts, key=lambda verdict: verdict.gain)
    for verdict in verdicts:
        check = verdict.check
        if 0 < verdict.gain < AS_GOOD * most.gain:
            words = f"better than configured too, but {most.check.name} explain more: {check.evidence}"
            check = attrs.evolve(
                check, result=WARNING, evidence=words, todo=f"mend {most.check.name} first, look again"
            )
        yield check


def chance(comparison: Comparison) -> str:
    """Returns the odds of a gain in words."""
    return f"(p = {comparison.p:.1g})"


def _unread(trial: Trial, configured: Trial) -> bool:
    """Whether a change of what the draft is given changed nothing; other labels are held against the same drafts."""
    given_again = trial.first is not configured.first
    return given_again and torch.equal(trial.first, configured.first) and _same(trial, configured)


def _same(one: Trial, other: Trial) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.drafts, other.drafts, strict=True))


def _layers(bench: Bench) -> list[Other] | str:
    ids = bench.patient.layer_ids or ()
    if not ids:
        return "the draft reads no states of the verifier"
    others = []
    for step, words in ((-1, "one earlier"), (1, "one later")):
        moved = tuple(layer + step for layer in ids)
        if min(moved) >= 0 and max(moved) <= bench.answers.num_layers:
            others.append(
                Other(
                    what=f"layers {list(moved)}",
                    means=f"the draft was trained on layers {words} than {list(ids)} (off by one)",
                    todo=f"write {list(moved)} into config.json; or mend the capture and train again: id l is the "
                    "stream entering layer l, id N the last layer's output before the final norm",
                    run=partial(_on_layers, bench, moved),
                )
            )
    return others or f"layers {list(ids)} of {bench.answers.num_layers} cannot be moved: the verifier has no others"


def _on_layers(bench: Bench, layer_ids: tuple[int, ...]) -> Trial:
    # Put together when it is tried: the states of all kinds at once would be many times those of one.
    return bench.attempt(states=bench.answers.states(layer_ids))


def _tokens(bench: Bench) -> list[Other] | str:
    return [
        Other(
            what=f"tokens one {words}",
            means=f"the draft was trained with tokens one place {words} beside the states (input shift {step:+d})",
            todo="pair the verifier's state at place i with token i + 1, and train again",
            run=partial(bench.attempt, Change(tokens=step)),
        )
        for step, words in ((-1, "earlier"), (1, "later"))
    ]


def _labels(bench: Bench) -> list[Other] | str:
    return [
        Other(
            what=f"labels one {words}",
            means=f"the draft says the token one place {words} than it is asked for: labels were shifted by {step:+d}",
            todo="the row that reads token i + 1 is to predict token i + 2: mend the shift and train again",
            run=partial(bench.configured.against, bench.responses, step),
        )
        for step, words in ((-1, "earlier"), (1, "later"))
    ]


def _positions(bench: Bench) -> list[Other] | str:
    return [
        Other(
            what=f"answer's positions {step:+d}",
            means=f"the draft was trained with the answer's tokens one position {words}, the prompt's where they are",
            todo="positions count the tokens of a document from 0, prompt and answer alike: mend them and train again",
            run=partial(bench.attempt, Change(positions=step)),
        )
        for step, words in ((-1, "earlier"), (1, "later"))
    ]


def _verifier_norm(bench: Bench) -> list[Other] | str:
    ids, last = bench.patient.layer_ids or (), bench.answers.num_layers
    if last not in ids:
        return f"layers {list(ids)}: the last layer's output, which alone has a norm behind it, is not read"

    def run() -> Trial:
        parts = [bench.answers.normed() if layer == last else bench.answers.states((layer,)) for layer in ids]
        return bench.attempt(states=[torch.cat(row, -1) for row in zip(*parts, strict=True)])

    means = "the draft was trained on the last layer's output behind the final norm, and is given it before the norm"
    todo = "capture the last layer's output before the final norm, and train again"
    return [Other(what="behind the norm", means=means, todo=todo, run=run)]


def _draft_norm(bench: Bench) -> list[Other] | str:
    norm = dict(bench.model.named_children()).get("norm")
    if norm is None:
        return "the draft has no final norm of its own"

    def run() -> Trial:
        try:
            bench.model.norm = nn.Identity()
            return bench.attempt()
        finally:
            bench.model.norm = norm

    means = "the draft was trained without its final norm, and has one here"
    return [Other(what="without the norm", means=means, todo="export the norm that training used", run=run)]


def _swaps(bench: Bench) -> list[Other] | str:
    norms = {name: one for name, one in bench.model.named_parameters() if name.endswith("norm.weight")}
    pairs = [
        (one, other)
        for one, other in combinations(sorted(norms), 2)
        if _parent(one) == _parent(other)
        and norms[one].shape == norms[other].shape
        and not torch.equal(norms[one], norms[other])
    ]
    if not pairs:
        return "no two norms of one layer have the same size and other values"
    return [
        Other(
            what=f"{one} and {other} swapped",
            means=f"{one} and {other} are swapped",
            todo="exchange them in model.safetensors; is a name rule of the import wrong?",
            run=partial(_swapped, bench, norms[one], norms[other]),
        )
        for one, other in pairs[:MOST_SWAPS]
    ]


def _options(bench: Bench) -> list[Other] | str:
    config = bench.patient.config
    assert config is not None
    held = {
        field.name: getattr(config, field.name)
        for field in type(config).recipe_fields()
        if not field.metadata.get("knob")
    }
    flips = {name: not value for name, value in held.items() if isinstance(value, bool)}
    fitting = [(name, value) for name, value in flips.items() if bench.patient.fits(**{name: value})]
    if not fitting:
        return "no option of config.json can be on and off with the same tensors"
    return [
        Other(
            what=f"{name} {json.dumps(value)}",
            means=f"the draft was trained with {name} = {json.dumps(value)}, config.json says {json.dumps(not value)}",
            todo=f"write {name} = {json.dumps(value)} into config.json; is a field of the import wrong?",
            run=partial(_with_option, bench, name, value),
        )
        for name, value in fitting[:MOST_OPTIONS]
    ]


def _with_option(bench: Bench, name: str, value: bool) -> Trial:
    return bench.attempt_with(bench.patient.with_config(**{name: value}))


def _parent(name: str) -> str:
    return name.rsplit(".", 2)[0] if name.count(".") > 1 else ""


def _swapped(bench: Bench, one: nn.Parameter, other: nn.Parameter) -> Trial:
    with exchanged(one, other):
        return bench.attempt()


@contextmanager
def exchanged(one: nn.Parameter, other: nn.Parameter) -> Iterator[None]:
    """Gives two parameters each other's values within the block."""
    one.data, other.data = other.data, one.data
    try:
        yield
    finally:
        one.data, other.data = other.data, one.data
