"""Is it one computation: training's forward, the step-by-step draft, packed rows, the export read again, in 16 bits.

All in float32 but the last; what may differ is the order in which sums are added up.
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
from speculators.doctor.alignment import Bench
from speculators.doctor.check import Check, Family
from speculators.doctor.training import trained_forward
from speculators.doctor.trials import LEVEL, attempt, compare
from speculators.errors import SpeculatorsError
from speculators.model import SpeculatorModel

PARITY = Family("parity")
# Of the largest logit, in float32: sums over H in another order were seen to differ by 2e-6 of it.
TOLERANCE = 1e-4
# Logarithms of smaller probabilities are rounded away, on either side.
LEAST_PROBABILITY = 1e-6
# Answers, and rounds of each, that are drafted step by step; tokens that a round emits, over and over.
ANSWERS, ROUNDS, EMITTED = 3, 4, (1, 3, 2, 1)
# Answers that are compared in 16 bits: as many as two cores without bf16 products take in a few seconds.
ANSWERS_16_BITS = 12
INPUTS = ("hidden_states", "input_ids", "position_ids", "document_ids")
MEND = "the number that training or spec bench shows is not the one that is served: mend the algorithm's code"


@attrs.frozen(eq=False)
class Sample:
    """A few answers with their states, as the model reads them."""

    model: SpeculatorModel
    responses: Sequence[Response]
    states: Sequence[torch.Tensor]
    k: int

    @classmethod
    def of(cls, bench: Bench, count: int) -> Sample:
        """Takes the shortest answers."""
        order = sorted(range(len(bench.answers.rows)), key=lambda row: len(bench.answers.rows[row].response.tokens))
        chosen = order[:count]
        states = bench.answers.states(bench.patient.layer_ids or ())
        responses = [bench.answers.rows[row].response for row in chosen]
        return cls(bench.model, responses, [states[row] for row in chosen], bench.k)

    def batch(self, *which: int) -> dict[str, torch.Tensor]:
        """Returns some of the answers packed into a row, as `replay` takes it."""
        sizes = [len(self.responses[row].tokens) for row in which]
        device = self.model.draft_to_target.device
        return {
            "hidden_states": torch.cat([self.states[row] for row in which]).to(device)[None],
            "input_ids": torch.tensor([t for row in which for t in self.responses[row].tokens], device=device)[None],
            "position_ids": torch.cat([torch.arange(size) for size in sizes]).to(device)[None],
            "document_ids": torch.repeat_interleave(torch.arange(len(which)), torch.tensor(sizes)).to(device)[None],
        }

    def logits(self, *which: int, model: SpeculatorModel | None = None) -> list[torch.Tensor]:
        """Returns the logits of each depth, [S, D], for some of the answers in one row."""
        used = self.model if model is None else model
        return list(used.replay(**self.batch(*which), num_speculative_tokens=self.k))


def check_parity(bench: Bench) -> Iterator[Check]:
    """Yields the checks, each of which tells by itself if it cannot be made."""
    sample = Sample.of(bench, ANSWERS)
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("training's forward", lambda: trained_forward(bench.patient, sample.responses, bench.answers)),
        ("step by step", lambda: _drafted(sample)),
        ("packed rows", lambda: _packed(sample)),
        ("export read again", lambda: _reloaded(bench, sample)),
        ("16 bits", lambda: _sixteen(bench)),
    )
    for name, check in checks:
        try:
            yield check()
        except SpeculatorsError as error:
            yield PARITY.skipped(name, str(error))
        # The algorithm's code may be somebody else's, and raise anything.
        except Exception as error:
            yield PARITY.wrong(name, f"the algorithm's code raised {type(error).__name__}: {error}", MEND)


def _packed(sample: Sample) -> Check:
    """Documents of one row must not see each other."""
    name, which = "packed rows", range(len(sample.responses))
    if len(which) < 2:
        return PARITY.skipped(name, "there is one answer only")
    together = sample.logits(*which)
    worst, start = 0.0, 0
    for row in which:
        size = len(sample.responses[row].tokens)
        for depth, (packed, alone) in enumerate(zip(together, sample.logits(row), strict=True), start=1):
            # Rows whose drafts leave the document may hold anything.
            kept = max(0, size - 1 - depth)
            worst = max(worst, _gap(packed[start : start + kept], alone[:kept]))
        start += size
    told = f"logits of {len(which)} answers in one row and one by one: {_told(worst)}"
    if worst <= TOLERANCE:
        return PARITY.ok(name, told)
    return PARITY.wrong(name, f"documents packed into a row see each other: {told}", MEND)


def _reloaded(bench: Bench, sample: Sample) -> Check:
    name = "export read again"
    with tempfile.TemporaryDirectory() as folder:
        sample.model.save_pretrained(Path(folder))
        again = SpeculatorModel.from_pretrained(Path(folder), verifier=bench.patient.verifier)
    again.to(bench.patient.device).float()
    worst = max(_gap(one, other) for one, other in zip(sample.logits(0), sample.logits(0, model=again), strict=True))
    told = f"logits before and after save and load: {_told(worst)}"
    if worst <= TOLERANCE:
        return PARITY.ok(name, told)
    return PARITY.wrong(name, f"config.json or the weights lose something: {told}", MEND)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest logit."""
    if not one.numel():
        return 0.0
    # What is no number is as far off as can be.
    return float((one - other).abs().nan_to_num(torch.inf).max() / one.abs().max().clamp_min(1e-9))


def _told(gap: float) -> str:
    return f"{gap:.1g} of the largest at most ({TOLERANCE:g} is allowed)"


def _drafted(sample: Sample) -> Check:
    """Holds the live drafter's logits, round by round with its cache, against replay's of the same drafts."""
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
        return PARITY.skipped(name, "the drafter proposed nothing")
    told = f"logits of {drafts} drafts of {rounds} rounds, by depth off by {', '.join(f'{gap:.1g}' for gap in gaps)}"
    told += f" of the largest at most ({TOLERANCE:g} is allowed)"
    if max(gaps) <= TOLERANCE:
        return PARITY.ok(name, f"draft with cache = replay: {told}")
    words = f"the drafter, step by step with its cache, is not what replay and training compute: {told}"
    return PARITY.wrong(name, words, MEND)


def _logit_gap(logits: torch.Tensor, probs: torch.Tensor) -> float:
    """Returns how far `probs` [D] are from softmax(logits), as logits, relative to the largest of these."""
    # A number that is added to all logits is no difference: no draft and no probability depends on it.
    gap = (logits.log_softmax(-1) - probs.log())[probs > LEAST_PROBABILITY]
    missed = float(1 - probs.sum())
    # All of what is drawn is in the draft vocabulary; what is no number is as far off as can be.
    if not len(gap) or abs(missed) > TOLERANCE:
        return float("inf")
    return float(gap.abs().nan_to_num(torch.inf).max() / logits.abs().max().clamp_min(1e-9))


def _rounds(
    sample: Sample, response: Response, states: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """Yields the proposal of each round, and replay's logits [D] at its depths with the drafts as input."""
    model, device = sample.model, sample.model.draft_to_target.device
    drafter, tokens, known = model.draft(), torch.tensor(response.tokens, device=device), response.prompt_length
    states = states.to(device)
    state = drafter.begin(tokens[: known + 1], states[:known])
    for turn in range(ROUNDS):
        proposal = drafter.propose(state, num_tokens=sample.k, temperature=1.0, generator=generator)
        if proposal.probs is None:
            raise SpeculatorsError("the drafter gives no probabilities of what it samples")
        seen = torch.cat((tokens[: known + 1], proposal.tokens))
        held = torch.zeros(len(seen), states.shape[1], device=device)
        held[:known] = states[:known]
        row = {
            "hidden_states": held[None],
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


def _sixteen(bench: Bench) -> Check:
    """Compares acceptance in bfloat16, in which most servers run."""
    name, count = "16 bits", ANSWERS_16_BITS
    model = copy.deepcopy(bench.model).to(torch.bfloat16)
    responses, configured = bench.responses[:count], bench.configured
    states = [state.to(torch.bfloat16) for state in bench.answers.states(bench.patient.layer_ids or ())[:count]]
    narrow = attempt(model, responses, states, bench.k)
    wide = attrs.evolve(configured, tables=configured.tables[:count])
    compared = compare(wide, narrow)
    told = f"tau in bfloat16 {narrow.tau:.3f}, in float32 {wide.tau:.3f} ({len(responses)} answers)"
    if compared.worse:
        words = f"{told}: rounding costs {-compared.share:.0%} of the accepted drafts (p = {compared.p_worse:.1g})"
        return PARITY.warning(name, words, f"serve in float32; below {LEVEL:g} this is no chance")
    return PARITY.ok(name, told)
