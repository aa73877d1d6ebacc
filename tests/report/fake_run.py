"""A run folder with numbers made up by a formula: many updates, two suites, two temperatures, a baseline."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from made_results import tokens_up_to

from speculators.bench.referee import Agreement
from speculators.bench.result import Acceptance, BaselineRow, BenchResult, Live, Setting, definition, with_drafted_costs
from speculators.bench.speed import Speed
from speculators.facts import VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan

UPDATES = 900
# Suite, temperature, and how much lower the acceptance rate is there.
Place = tuple[str, float, float]
PLACES: tuple[Place, ...] = (("talk", 0.0, 0.0), ("talk", 1.0, 0.06), ("code", 0.0, -0.1))
CATEGORIES = ("chat", "code", "arithmetic", "explanation", "summarising", "translation")


def acceptance(rate: float, k: int, prompts: int = 64) -> Acceptance:
    """The acceptance of a drafter with the same rate at every position."""
    by_position = tuple(rate**j for j in range(1, k + 1))
    tau = 1 + sum(by_position)
    return Acceptance(
        prompts=prompts,
        tokens=1000.0,
        rounds=1000.0 / tau,
        tau=tau,
        tau_interval=(tau - 0.8 / math.sqrt(prompts), tau + 0.8 / math.sqrt(prompts)),
        drafted=float(k),
        by_position=by_position,
        by_position_conditional=(rate,) * k,
    )


def setting(suite: str, k: int, temperature: float, rate: float) -> Setting:
    """One setting, in which longer rounds cost more."""
    exact, ngram = acceptance(rate, k), acceptance(0.3, k)
    speed = Speed(
        plain=40.0,
        speculative=40 * exact.tau / (1.1 + 0.06 * k),
        tau=exact.tau,
        speed_up=exact.tau / (1.1 + 0.06 * k),
        draft_seconds=0.002 * k,
        verify_seconds=0.025,
        unmatched_baseline=False,
    )
    return Setting(
        suite=suite,
        prompts_digest=suite,
        num_speculative_tokens=k,
        temperature=temperature,
        definition=definition(k, temperature),
        note="",
        exact=exact,
        by_category={name: acceptance(rate - 0.02 * n, k, 10) for n, name in enumerate(CATEGORIES)},
        by_prompt={"a": (10.0, 6.0), "b": (12.0, 7.0)},
        by_context=(tokens_up_to(256, exact.tau),),
        by_place=(tokens_up_to(64, exact.tau), tokens_up_to(128, exact.tau)),
        baselines=(BaselineRow(name="ngram", acceptance=ngram, live_tau=ngram.tau, speed=speed),),
        live=Live(
            acceptance=exact, agreement=Agreement(criterion="round for round", predicted_tau=exact.tau), speed=speed
        ),
        cut_prompts=0,
        cut_tokens=0,
        replaced_prompts=0,
    )


def fake_run(
    folder: Path, facts: VerifierFacts, *sets: str, rate: float = 0.6, places: tuple[Place, ...] = PLACES
) -> Path:
    """Writes a run of the smoke recipe with these overrides as if it had trained for long; returns its folder."""
    plan = make_plan(load_recipe("smoke", sets), facts)
    run = folder / plan.run_name
    (run / "bench").mkdir(parents=True)
    (run / "recipe.toml").write_bytes(plan.recipe.file.read_bytes())
    (run / "plan.json").write_text(json.dumps(plan.to_dict()))
    lock = {"format": 1, "fingerprints": {s.name: s.fingerprint for s in plan.stages}, "packages": {"torch": "2.13"}}
    (run / "lock.json").write_text(json.dumps({**lock, "device": "cuda", "threads": 8, "world_size": 1}))
    chance = random.Random(0)
    events = [
        {"event": "StageEvent", "stage": name, "status": "done", "seconds": seconds, "detail": f"{name} is done"}
        for name, seconds in (("verifier", 3.0), ("prepare", 12.0), ("capture", 95.0), ("train", 4800.0))
    ]
    for step in range(1, UPDATES + 1):
        loss = 2.2 + 6 * math.exp(-step / 120) + chance.gauss(0, 0.12)
        counted = {"tokens": 2048, "tokens_per_second": 1500.0, "seconds_left": 0.0}
        counted |= {"epoch": 0, "learning_rate": 1e-4 * (1 - step / UPDATES), "grad_norm": 1.0}
        counted["metrics"] = {f"accuracy_{depth}": rate**depth * step / UPDATES for depth in (1, 2, 3)}
        events.append({"event": "StepEvent", "step": step, "total_steps": UPDATES, "loss": loss, **counted})
        if step % 90 == 0:
            tau = acceptance(rate * (1 - math.exp(-step / 150)), 3).tau
            events.append({"event": "EvalEvent", "step": step, "tau": tau})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    trained = {"tau": 2.1, "step": 810, "total_steps": UPDATES, "checkpoint": "step-00000810", "files": {}}
    trained |= {"fingerprint": plan.stage("train").fingerprint, "seconds": 4800.0}
    (run / "train.json").write_text(json.dumps(trained))
    result = BenchResult(
        speculator=run.name,
        verifier="tiny",
        device="cuda",
        threads=8,
        dtype="bfloat16",
        seed=0,
        max_new_tokens=160,
        settings=with_drafted_costs(
            [setting(suite, k, temperature, rate - cost) for suite, temperature, cost in places for k in (3, 5, 7)]
        ),
    )
    (run / "bench" / "0.json").write_text(json.dumps({"fingerprint": "0", **result.to_json()}))
    return run
