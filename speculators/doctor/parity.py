"""Checks that training, step-by-step drafting, packed rows, the reloaded export and 16 bits compute the same drafts.

All but the last run in float32, where only the order of summation may differ.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.bench.rows import Response
from speculators.doctor.check import Check, Family
from speculators.doctor.effort import LEFT_OUT
from speculators.doctor.paired import LEVEL, compare
from speculators.doctor.training import trained_forward
from speculators.doctor.trials import DraftTrials, attempt
from speculators.errors import SpeculatorsError
from speculators.model import SpeculatorModel

PARITY = Family("parity")
# Relative to the largest logit, in float32: reordered sums over H differed by 2e-6 of it in practice.
TOLERANCE = 1e-4
# Logarithms of smaller probabilities drown in rounding on either side.
LEAST_PROBABILITY = 1e-6
# Answers to draft step by step, rounds per answer, and the cycle of tokens that the rounds emit.
ANSWERS, ROUNDS, EMITTED = 3, 4, (1, 3, 2, 1)
# Answers to compare in 16 bits: two cores without bf16 instructions need a few seconds for these.
ANSWERS_16_BITS = 12
# Checks that a quick examination leaves out: they build, write or convert whole models.
FORWARD = "training's forward"
SLOW = (FORWARD, "export read again", "16 bits")
INPUTS = ("hidden_states", "input_ids", "position_ids", "document_ids")
MEND = "what training or spec bench reports is not what is served: fix the algorithm's code"


@attrs.frozen(eq=False)
class ParitySample:
    """A few answers with their states, ready for the model."""

    model: SpeculatorModel
    responses: Sequence[Response]
    states: Sequence[torch.Tensor]
    k: int

    @classmethod
    def of(cls, trials: DraftTrials, count: int) -> ParitySample:
        """Picks the shortest answers."""
        order = sorted(range(len(trials.answers.rows)), key=lambda row: len(trials.answers.rows[row].response.tokens))
        chosen = order[:count]
        states = trials.answers.states(trials.speculator.layer_ids or ())
        responses = [trials.answers.rows[row].response for row in chosen]
        return cls(trials.model, responses, [states[row] for row in chosen], trials.k)

    def batch(self, *which: int) -> dict[str, torch.Tensor]:
        """Packs some of the answers into one row for `replay`."""
        sizes = [len(self.responses[row].tokens) for row in which]
        device = self.model.draft_to_target.device
        return {
            "hidden_states": torch.cat([self.states[row] for row in which]).to(device)[None],
            "input_ids": torch.tensor([t for row in which for t in self.responses[row].tokens], device=device)[None],
            "position_ids": torch.cat([torch.arange(size) for size in sizes]).to(device)[None],
            "document_ids": torch.repeat_interleave(torch.arange(len(which)), torch.tensor(sizes)).to(device)[None],
        }

    def logits(self, *which: int, model: SpeculatorModel | None = None) -> list[torch.Tensor]:
        """Replays some of the answers in one row: the logits of each depth, [S, D]."""
        used = self.model if model is None else model
        return list(used.replay(**self.batch(*which), num_speculative_tokens=self.k))


def check_parity(trials: DraftTrials, *, thorough: bool = True) -> Iterator[Check]:
    """Yields the parity checks; one that cannot run does not stop the others."""
    sample = ParitySample.of(trials, ANSWERS)
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        (FORWARD, lambda: trained_forward(trials.speculator, sample.responses, trials.answers)),
        ("step by step", lambda: _drafted(sample)),
        ("packed rows", lambda: _packed(sample)),
        ("export read again", lambda: _reloaded(trials, sample)),
        ("16 bits", lambda: _sixteen(trials)),
    )
    for name, check in checks:
        if not thorough and name in SLOW:
            yield PARITY.skipped(name, LEFT_OUT)
            continue
        try:
            yield check()
        except SpeculatorsError as error:
            yield PARITY.skipped(name, str(error))
        # A plug-in's code may raise anything.
        except Exception as error:
            yield PARITY.wrong(name, f"the algorithm's code raised {type(error).__name__}: {error}", MEND)


def _packed(sample: ParitySample) -> Check:
    """Compares answers packed into one row with each answer alone: documents must not see each other."""
    name, which = "packed rows", range(len(sample.responses))
    if len(which) < 2:
        return PARITY.skipped(name, "there is only one answer")
    together = sample.logits(*which)
    worst, start = 0.0, 0
    for row in which:
        size = len(sample.responses[row].tokens)
        for depth, (packed, alone) in enumerate(zip(together, sample.logits(row), strict=True), start=1):
            # Rows whose drafts leave the document are undefined.
            kept = max(0, size - 1 - depth)
            worst = max(worst, _gap(packed[start : start + kept], alone[:kept]))
        start += size
    figures = f"logits of {len(which)} answers in one row and one by one differ by {_largest(worst)}"
    if worst <= TOLERANCE:
        return PARITY.ok(name, figures)
    return PARITY.wrong(name, f"documents packed into a row attend to each other: {figures}", MEND)


def _reloaded(trials: DraftTrials, sample: ParitySample) -> Check:
    name = "export read again"
    with tempfile.TemporaryDirectory() as folder:
        sample.model.save_pretrained(Path(folder))
        again = SpeculatorModel.from_pretrained(Path(folder), verifier=trials.speculator.verifier)
    again.to(trials.speculator.device).float()
    worst = max(_gap(one, other) for one, other in zip(sample.logits(0), sample.logits(0, model=again), strict=True))
    figures = f"logits before saving and after loading differ by {_largest(worst)}"
    if worst <= TOLERANCE:
        return PARITY.ok(name, figures)
    return PARITY.wrong(name, f"config.json or the weights lose something: {figures}", MEND)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest logit; infinite for NaN."""
    if not one.numel():
        return 0.0
    return float((one - other).abs().nan_to_num(torch.inf).max() / one.abs().max().clamp_min(1e-9))


def _largest(gap: float) -> str:
    return f"at most {gap:.1g} of the largest ({TOLERANCE:g} is allowed)"


def _drafted(sample: ParitySample) -> Check:
    """Compares the live drafter's logits, round by round with its cache, with replay's for the same drafts."""
    name, gaps, rounds = "step by step", [0.0] * sample.k, 0
    generator = torch.Generator(device=sample.model.draft_to_target.device).manual_seed(0)
    drafts = 0
    for response, states in zip(sample.responses, sample.states, strict=True):
        for proposal, replayed in _rounds(sample, response, states, generator):
            rounds, drafts = rounds + 1, drafts + len(proposal.tokens)
            for depth, logits in zip(range(len(proposal.tokens)), replayed, strict=False):
                gap = _logit_gap(logits.float(), proposal.probs[depth][sample.model.draft_to_target])
                gaps[depth] = max(gaps[depth], gap)
    if not drafts:
        return PARITY.skipped(name, "the drafter proposed no token")
    by_depth = ", ".join(f"{gap:.1g}" for gap in gaps)
    figures = f"logits of {drafts} drafts in {rounds} rounds differ, by depth, by at most {by_depth} of the largest"
    figures += f" ({TOLERANCE:g} is allowed)"
    if max(gaps) <= TOLERANCE:
        return PARITY.ok(name, f"drafting with a cache equals replay: {figures}")
    evidence = f"the drafter, step by step with its cache, does not compute what replay and training do: {figures}"
    return PARITY.wrong(name, evidence, MEND)


def _logit_gap(logits: torch.Tensor, probs: torch.Tensor) -> float:
    """Distance of `probs` [D] from softmax(logits), measured in logits, relative to the largest of them."""
    # log_softmax removes a constant added to all logits: neither drafts nor probabilities depend on it.
    gap = (logits.log_softmax(-1) - probs.log())[probs > LEAST_PROBABILITY]
    missed = float(1 - probs.sum())
    # All probability must lie in the draft vocabulary; NaN counts as infinitely far.
    if not len(gap) or abs(missed) > TOLERANCE:
        return float("inf")
    return float(gap.abs().nan_to_num(torch.inf).max() / logits.abs().max().clamp_min(1e-9))


def _rounds(
    sample: ParitySample, response: Response, states: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """Yields each round's proposal with replay's logits [D] per depth, the drafts being its input."""
    model, device = sample.model, sample.model.draft_to_target.device
    drafter, tokens, known = model.draft(), torch.tensor(response.tokens, device=device), response.prompt_length
    states = states.to(device)
    state = drafter.begin(tokens[: known + 1], states[:known])
    for turn in range(ROUNDS):
        proposal = drafter.propose(state, num_tokens=sample.k, temperature=1.0, generator=generator)
        if proposal.probs is None:
            raise SpeculatorsError("the drafter gives no probabilities for the tokens that it samples")
        seen = torch.cat((tokens[: known + 1], proposal.tokens))
        known_states = torch.zeros(len(seen), states.shape[1], device=device)
        known_states[:known] = states[:known]
        row = {
            "hidden_states": known_states[None],
            "input_ids": seen[None],
            "position_ids": torch.arange(len(seen), device=device)[None],
            "document_ids": torch.zeros(1, len(seen), dtype=torch.int64, device=device),
        }
        replayed = model.replay(**row, num_speculative_tokens=sample.k)
        yield proposal, [logits[known - 1] for logits in replayed]
        step = EMITTED[turn % len(EMITTED)]
        if known + step >= len(tokens):
            return
        drafter.advance(state, tokens[known + 1 : known + 1 + step], states[known : known + step])
        known += step


def _sixteen(trials: DraftTrials) -> Check:
    """Compares acceptance in bfloat16, which most servers use, with float32."""
    name, count = "16 bits", ANSWERS_16_BITS
    model = copy.deepcopy(trials.model).to(torch.bfloat16)
    responses, configured = trials.responses[:count], trials.configured
    states = [state.to(torch.bfloat16) for state in trials.answers.states(trials.speculator.layer_ids or ())[:count]]
    narrow = attempt(model, responses, states, trials.k)
    wide = configured.first_answers(count)
    compared = compare(wide, narrow)
    figures = f"tau {narrow.tau:.3f} in bfloat16, {wide.tau:.3f} in float32 ({len(responses)} answers)"
    if compared.worse:
        cost = f"rounding costs {-compared.share:.0%} of the accepted drafts (p = {compared.p_worse:.1g})"
        return PARITY.warning(name, f"{figures}: {cost}", f"serve in float32 (p below {LEVEL:g} is not chance)")
    return PARITY.ok(name, figures)
