"""Benchmark results with made-up numbers; keyword arguments set the values that a test is about."""

from __future__ import annotations

from typing import Any

from speculators.bench.bins import TokenBin
from speculators.bench.referee import Agreement
from speculators.bench.result import Acceptance, BenchResult, Live, Setting
from speculators.bench.speed import Speed
from speculators.servers.audit import DIFFERS, AuditedRound, AuditResult, Tally
from speculators.servers.load import ServingSpeed
from speculators.servers.result import ServedAcceptance, ServedResult, ServedSetting
from speculators.tune.result import BatchRange, CandidateK, ServedTuning, TuneResult


def acceptance(tau: float = 1.9, **changes: Any) -> Acceptance:
    """Makes the acceptance of twenty prompts at K = 3."""
    values: dict[str, Any] = {
        "prompts": 20,
        "tokens": 190.0,
        "rounds": 100.0,
        "tau_interval": (1.8, 2.2),
        "drafted": 3.0,
        "by_position": (0.6, 0.3, 0.1),
        "by_position_conditional": (0.6, 0.5, 0.3),
    }
    return Acceptance(tau=tau, **(values | changes))


def tokens_up_to(up_to: int, tau: float) -> TokenBin:
    """Makes a bin in which one prompt has ten rounds."""
    return TokenBin(up_to=up_to, tau=tau, tau_interval=(tau, tau), by_prompt={"a": (10 * tau, 10.0)})


def speed(**changes: Any) -> Speed:
    values: dict[str, Any] = {
        "plain": 20.0,
        "speculative": 25.0,
        "tau": 1.9,
        "speed_up": 1.25,
        "draft_seconds": 0.01,
        "verify_seconds": 0.05,
        "unmatched_baseline": False,
    }
    return Speed(**(values | changes))


def live(**changes: Any) -> Live:
    """Makes a live decode that agrees in every round; `changes` alter its agreement."""
    agreement: dict[str, Any] = {"criterion": "round for round", "predicted_tau": 1.9}
    return Live(acceptance=acceptance(prompts=3), agreement=Agreement(**(agreement | changes)), speed=speed())


def setting(**changes: Any) -> Setting:
    """Makes a setting of suite "mine" at K = 3 and T = 0."""
    values: dict[str, Any] = {
        "suite": "mine",
        "prompts_digest": "d",
        "num_speculative_tokens": 3,
        "temperature": 0.0,
        "definition": "tau is",
        "note": "",
        "exact": acceptance(),
        "by_category": {},
        "by_prompt": {},
        "baselines": (),
        "live": live(),
        "cut_prompts": 0,
        "cut_tokens": 0,
        "replaced_prompts": 0,
    }
    return Setting(**(values | changes))


def bench_result(*settings: Setting, **changes: Any) -> BenchResult:
    """Makes a result measured in float32 on a CPU."""
    values: dict[str, Any] = {
        "speculator": "run",
        "verifier": "tiny",
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "seed": 0,
        "max_new_tokens": 64,
    }
    return BenchResult(settings=settings, **(values | changes))


def served_setting(**changes: Any) -> ServedSetting:
    """Makes a served setting with the suite, K and T of `setting`."""
    pace = ServingSpeed(
        requests=20, tokens=200, seconds=4.0, tokens_per_second=50.0, first_token=None, inter_token=None, repeated=0
    )
    values: dict[str, Any] = {
        "suite": "mine",
        "prompts_digest": "d",
        "prompt_ids": (),
        "suite_digest": "d",
        "num_speculative_tokens": 3,
        "temperature": 0.0,
        "definition": "as the server counts",
        "acceptance": served_acceptance(),
        "by_prompt": None,
        "pace": pace,
        "baseline": None,
        "speed_up": None,
        "unmatched_baseline": False,
    }
    return ServedSetting(**(values | changes))


def served_acceptance(tau: float = 1.9, **changes: Any) -> ServedAcceptance:
    values: dict[str, Any] = {
        "prompts": 20,
        "responses": 20,
        "tokens": 190.0,
        "rounds": 100.0,
        "tau_interval": (1.8, 2.2),
        "drafted": None,
        "by_position": (0.6, 0.3, 0.1),
        "undrafted": 0.0,
    }
    return ServedAcceptance(tau=tau, **(values | changes))


def served_result(*settings: ServedSetting, **changes: Any) -> ServedResult:
    values: dict[str, Any] = {
        "speculator": "run",
        "verifier": "tiny",
        "engine": "vllm",
        "version": "1",
        "model": "tiny",
        "endpoint": "http://here",
        "baseline_endpoint": None,
        "baseline_model": None,
        "concurrency": 1,
        "max_new_tokens": 64,
        "seed": 0,
    }
    return ServedResult(settings=settings, **(values | changes))


def candidate(k: int, *, predicted: float, measured: float | None = None, **changes: Any) -> CandidateK:
    """Makes a K with a tau of 2; `measured` is the speed-up of its real decoding."""
    values: dict[str, Any] = {
        "tau": 2.0,
        "tau_interval": (1.9, 2.1),
        "draft_seconds": 0.001 * k,
        "verify_seconds": 0.02,
        "cost": 2.0 / predicted,
        "predicted_interval": (predicted - 0.1, predicted + 0.1),
        "chance_of_best": 0.5,
        "measured": None if measured is None else speed(speed_up=measured),
    }
    return CandidateK(num_speculative_tokens=k, predicted=predicted, **(values | changes))


def tuning(*candidates: CandidateK) -> TuneResult:
    """Makes a tuning in process on suite "mine" at T = 0."""
    return TuneResult(
        speculator="run",
        verifier="model",
        device="cpu",
        threads=2,
        dtype="bfloat16",
        suite="mine",
        prompts=20,
        prompts_digest="d",
        temperature=0.0,
        max_new_tokens=160,
        seed=0,
        plain_seconds=0.02,
        noise=0.05,
        cycles=60,
        candidates=candidates,
    )


def served_tuning(*schedule: BatchRange) -> ServedTuning:
    """Makes a tuning of vLLM servers, without what was measured."""
    return ServedTuning(
        speculator="run",
        engine="vllm",
        version="1.2.3",
        suite="mine",
        temperature=0.0,
        max_new_tokens=160,
        taus=((1, 1.5), (3, 2.0)),
        points=(),
        choices=(),
        schedule=schedule,
        off_from=None,
    )


def audited_round(**changes: Any) -> AuditedRound:
    """Makes a round that accepts one draft fewer than predicted, at depth 2."""
    values: dict[str, Any] = {
        "suite": "mine",
        "prompt": "p1",
        "turn": 0,
        "has_system": False,
        "number": 0,
        "anchor": 3,
        "position": 24,
        "predicted": 2,
        "served": 1,
        "verdict": DIFFERS,
        "depth": 2,
        "draft_gap": 1.25,
        "verifier_gap": 0.5,
    }
    return AuditedRound(**(values | changes))


def tally(**changes: Any) -> Tally:
    """Makes the counts of an audit that passes, with 300 rounds."""
    values: dict[str, Any] = {
        "answers": 20,
        "tokens": 640,
        "foreign_tokens": 0,
        "tied_tokens": 0,
        "rounds": 300,
        "agreeing": 298,
        "near_ties": 2,
        "predicted_tau": 620 / 300,
        "served_tau": 620 / 300,
    }
    return Tally(**(values | changes))


def audit(**changes: Any) -> AuditResult:
    """Makes an audit that passes."""
    values: dict[str, Any] = {
        "speculator": "run",
        "verifier": "tiny",
        "engine": "vllm",
        "version": "1.2.3",
        "model": "tiny",
        "endpoint": "http://here",
        "suites": ("mine",),
        "prompts_digests": ("d",),
        "num_speculative_tokens": 3,
        "max_new_tokens": 32,
        "concurrency": 1,
        "dtype": "float32",
        "near_tie": "0.001 logits (float32)",
        "source": "metrics.speculative_decoding of each answer",
        "tally": tally(),
        "differing": (),
        "patterns": (),
        "explanations": (),
    }
    return AuditResult(**(values | changes))
