"""The part `decode`: milliseconds of drafting and of verifying with the speculator that `online` trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.lines import SKIPPED, Judged, VerdictLine, judged
from benchmarks.gpu.online import speculator
from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.verifier import random_verifier
from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.nn.precision import place
from speculators.verifier.engine import Engine

K = (1, 3, 5)


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for plain decoding, and one for each number of drafts."""
    folder = speculator(setup)
    if not folder.exists():
        reason = "there is no speculator: the part online did not run, or failed"
        yield VerdictLine(name="decode", verdict=SKIPPED, reason=reason)
        return
    engine = Engine(random_verifier(setup), dtype="bfloat16", device=setup.device)
    model = SpeculatorModel.from_pretrained(folder, verifier=engine.folder)
    model = place(model.eval(), setup.device, beside=engine.dtype)
    for k in (0, *K):
        yield judged(f"K = {k}" if k else "plain", partial(decoded, setup, engine, model, k))


def decoded(setup: PartSetup, engine: Engine, model: SpeculatorModel, k: int) -> Judged:
    """Decodes greedily, after a few tokens that warm up; drafts of random weights are hardly ever accepted."""
    prompt = torch.arange(3, 19 if setup.small else 131)
    result, new = _answer(engine, model, prompt, k, 4), 6 if setup.small else 96
    result = _answer(engine, model, prompt, k, new)
    rounds = max(1, len(result.rounds))
    figures = {
        "verify_ms": 1e3 * result.verify_seconds / rounds,
        "draft_ms": 1e3 * result.draft_seconds / rounds,
        "prefill_ms": 1e3 * result.prefill_seconds,
        "tokens": len(result.tokens),
        "rounds": len(result.rounds),
    }
    drafted = sum(each.drafted for each in result.rounds)
    sound = len(result.tokens) == new and (drafted > 0) == (k > 0)
    return figures, "" if sound else f"{len(result.tokens)} of {new} tokens, {drafted} drafted"


def _answer(engine: Engine, model: SpeculatorModel, prompt: torch.Tensor, k: int, new: int) -> Decoded:
    drafter = model.draft() if k else None
    verifier = CachedVerifier(engine.model, () if drafter is None else drafter.target_layer_ids)
    return decode(verifier, drafter, prompt, max_new_tokens=new, num_tokens=k)
