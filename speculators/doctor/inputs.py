"""Alternatives of what the draft reads: layers and their order, tokens, labels, positions, norms and options."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import torch
from torch import nn

from speculators.doctor.alternative import Alternative, Alternatives
from speculators.doctor.trials import DraftTrials, Shift, Trial

# All orders of more states would be too many: beyond this number, only those that mistakes make.
ALL_ORDERS = 3
MOST_OPTIONS = 8
BY_ONE = ((-1, "earlier"), (1, "later"))
LAYER_RULE = "id l is the stream entering layer l, id N the last layer's output before the final norm"


def layers(trials: DraftTrials) -> Alternatives:
    """All layers moved by one, or a single one."""
    ids = trials.speculator.layer_ids or ()
    if not ids:
        return "the draft does not read the verifier's states"
    others = []
    for step, direction in BY_ONE:
        moved = [(tuple(layer + step for layer in ids), f"layers one {direction} than {list(ids)} (off by one)")]
        for place, layer in enumerate(ids if len(ids) > 1 else ()):
            other = (*ids[:place], layer + step, *ids[place + 1 :])
            moved.append((other, f"layer {layer + step}, one {direction} than {layer} of {list(ids)}"))
        others += [
            Alternative(
                f"layers {list(new)}",
                f"the draft was trained on {means}",
                f"write {list(new)} into config.json, or fix the capture and train again: {LAYER_RULE}",
                partial(_on_layers, new),
                common=new == tuple(layer + step for layer in ids),
            )
            for new, means in moved
            if min(new) >= 0 and max(new) <= trials.answers.num_layers and len(set(new)) == len(new)
        ]
    return others or f"layers {list(ids)} of {trials.answers.num_layers} cannot be moved: no neighbours"


def _on_layers(layer_ids: tuple[int, ...], trials: DraftTrials) -> Trial:
    return trials.attempt_on(layer_ids)


def order(trials: DraftTrials) -> Alternatives:
    """The states of the same layers, concatenated in another order."""
    ids = trials.speculator.layer_ids or ()
    if len(ids) < 2:
        return "the draft reads the states of one layer at most"
    return [
        Alternative(
            f"order {list(new)}",
            f"the draft was trained on the states in the order {list(new)}, and reads {list(ids)}",
            "concatenate them in that order, or reorder the columns of the projection that reads them",
            partial(_on_layers, new),
        )
        for new in orders(ids)
    ]


def orders(items: Sequence[int]) -> list[tuple[int, ...]]:
    """Lists the orders of some items that a mistake makes: all of a few; else reversed, rotated, two neighbours."""
    given_order, size = tuple(items), len(items)
    if size <= ALL_ORDERS:
        return [one for one in permutations(given_order) if one != given_order]
    rotated = [(*given_order[by:], *given_order[:by]) for by in (1, size // 2, size - 1)]
    neighbours = [
        (*given_order[:at], given_order[at + 1], given_order[at], *given_order[at + 2 :]) for at in range(size - 1)
    ]
    return list(dict.fromkeys([given_order[::-1], *rotated, *neighbours]))


def tokens(_: DraftTrials) -> Alternatives:
    """The tokens one place earlier or later beside the states."""
    return _by_one(
        "tokens one {direction}",
        "the draft was trained with tokens one place {direction} beside the states (input shift {step:+d})",
        "pair the verifier's state at place i with token i + 1, and train again",
        lambda step: partial(_shifted, Shift(tokens=step)),
    )


def positions(_: DraftTrials) -> Alternatives:
    """The positions of the answer one off from the prompt's."""
    return _by_one(
        "answer's positions {step:+d}",
        "the draft was trained with the answer's tokens one position {direction}, the prompt's unmoved",
        "number the tokens of a document from 0, prompt and answer alike, and train again",
        lambda step: partial(_shifted, Shift(positions=step)),
    )


def _shifted(shift: Shift, trials: DraftTrials) -> Trial:
    return trials.attempt(shift)


def labels(_: DraftTrials) -> Alternatives:
    """The same drafts, judged as those of the place before or behind."""
    return _by_one(
        "labels one {direction}",
        "the draft predicts the token one place {direction} than asked: labels were shifted by {step:+d}",
        "make the row that reads token i + 1 predict token i + 2, and train again",
        lambda step: partial(_against, step),
    )


def _against(step: int, trials: DraftTrials) -> Trial:
    return trials.configured.against(trials.responses, step)


def _by_one(what: str, means: str, todo: str, run: Callable[[int], Callable[[DraftTrials], Trial]]) -> Alternatives:
    """Makes both alternatives that are off by one; the texts name `{step}` or `{direction}`."""
    return [
        Alternative(
            what.format(step=step, direction=direction),
            means.format(step=step, direction=direction),
            todo,
            run(step),
        )
        for step, direction in BY_ONE
    ]


def verifier_norm(trials: DraftTrials) -> Alternatives:
    """The last layer's output after the verifier's final norm."""
    ids, last = trials.speculator.layer_ids or (), trials.answers.num_layers
    if last not in ids:
        return f"layers {list(ids)}: the draft does not read the last layer's output, the only one that a norm follows"

    def run(some: DraftTrials) -> Trial:
        parts = [some.answers.normed() if layer == last else some.answers.states((layer,)) for layer in ids]
        return some.attempt(states=[torch.cat(row, -1) for row in zip(*parts, strict=True)])

    means = "the draft was trained on the last layer's output after the final norm, and now reads it before the norm"
    todo = "capture the last layer's output before the final norm, and train again"
    return [Alternative("after the norm", means, todo, run)]


def draft_norm(trials: DraftTrials) -> Alternatives:
    """The draft without its own final norm."""
    norm = dict(trials.model.named_children()).get("norm")
    if norm is None:
        return "the draft has no final norm of its own"

    def run(some: DraftTrials) -> Trial:
        try:
            some.model.norm = nn.Identity()
            return some.attempt()
        finally:
            some.model.norm = norm

    means = "the draft was trained without its final norm, but config.json gives it one"
    return [Alternative("no final norm", means, "export the norm that training used", run)]


def options(trials: DraftTrials) -> Alternatives:
    """Each option of config.json flipped, if the tensors fit both values."""
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
            f"{name} {json.dumps(value)}",
            f"the draft was trained with {name} = {json.dumps(value)}, config.json says {json.dumps(not value)}",
            f"write {name} = {json.dumps(value)} into config.json, and check the fields of the import",
            partial(_with_option, name, value),
        )
        for name, value in fitting[:MOST_OPTIONS]
    ]


def _with_option(name: str, value: bool, trials: DraftTrials) -> Trial:
    return trials.attempt_with(trials.speculator.with_config(**{name: value}))
