"""Runs algorithms and verifiers on the stand-in, and prints what happened as JSON: a child process.

python algorithms.py [NAME..]        with hooks.so in LD_PRELOAD and tests/ in PYTHONPATH
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch
from models.conftest import World as Conversations
from models.proof import judged, row_of
from models.test_proof import ALGORITHMS, config_of, reduced
from standin.device import CUDA, KERNELS, CudaTensor, device, waits
from verifier.families import make

from speculators.bench.replay import replay
from speculators.decoding.loop import decode
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.target import CachedVerifier
from speculators.nn.layout import RowLayout
from speculators.nn.precision import beside_verifier, has_bf16_products, place
from speculators.recipe.schema import ScheduleSection
from speculators.training.optimizer import Optimizer
from speculators.training.state import Batch, BatchRow, Job
from speculators.training.stop import StopRequest
from speculators.training.update import Worker, update
from speculators.training.world import World, repeatable
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

K, ANSWER = 3, 8
# A mixture of experts; one with a sliding window in half of its layers; a window alone.
VERIFIERS = ("Qwen3 MoE", "gpt-oss", "Gemma 2")


def conversations(folder: Path) -> Conversations:
    """A tiny verifier with four greedy conversations of its own."""
    make_tiny_verifier(folder)
    engine = Engine(folder, dtype="float32")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 250, (size,), generator=generator).tolist() for size in (6, 9, 12, 5)]
    return Conversations(folder, engine, prompts, engine.generate(prompts, max_new_tokens=16))


def one_update(model: Any, kwargs: dict[str, Any], row: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Makes one update in bf16, and returns the gradients that the optimizer received, on the CPU."""
    schedule = ScheduleSection(precision="bf16")
    job = Job(schedule=schedule, total_steps=10, seed=0, folder=Path(), fingerprint="")
    optimizer = Optimizer(model, schedule.optimizer, ema=None)
    gradients: dict[str, torch.Tensor] = {}
    step = optimizer.step

    def keep_and_step(factor: float) -> None:
        gradients.update((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        step(factor)

    optimizer.step = keep_and_step
    worker = Worker(
        model=model, optimizer=optimizer, job=job, world=World(device=torch.device(where)), train_kwargs=kwargs
    )
    supervised = int(row["loss_mask"].sum())
    layout = RowLayout.of(row["document_ids"], row["loss_mask"])
    rows = [BatchRow(tensors=row, supervised=supervised, index=0, layout=layout)]
    batch = Batch(epoch=0, rows=iter(rows), num_rows=1, tokens=layout.size, supervised=supervised)
    update(worker, batch, step=0, request=StopRequest())
    return {name: getattr(grad, "host", grad) for name, grad in gradients.items()}


@attrs.define
class Trial:
    """One algorithm on the device: each part notes its result, or the error that ended it."""

    results: dict[str, Any] = attrs.field(factory=dict)

    def note(self, part: str, measure: Callable[[], Any]) -> None:
        waits.clear()
        try:
            self.results[part] = measure()
        except Exception as error:
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            self.results[part] = f"{type(error).__name__}: {str(error)[:300]} in {lines[-8:]}"
        self.results[f"{part} waits"] = dict(waits)


def trial(talks: Conversations, verifier: Any, name: str, vocabulary: int | None) -> dict[str, Any]:
    """Compares an update with the CPU's, and replays and decodes at both temperatures."""
    on_cpu, kwargs = talks.build(config_of(name), vocabulary)
    row = row_of(talks, on_cpu, 0, 1, 2)
    for states in ("hidden_states", "verifier_last_hidden_states"):
        row[states] = row[states].bfloat16()
    expected = one_update(on_cpu, kwargs, row, "cpu")
    model, _ = talks.build(config_of(name), vocabulary)
    one = Trial()
    with device():
        place(model, CUDA)

        def train() -> float:
            actual = one_update(model, kwargs, row, "cuda")
            assert actual.keys() == expected.keys()
            return max(float((actual[n] - expected[n]).norm() / (expected[n].norm() + 1e-9)) for n in expected)

        with repeatable(enabled=True):
            one.note("train", train)
            model.eval()
            with beside_verifier(torch.bfloat16, CUDA):
                one.note("evaluate in 16 bits", lambda: torch.is_autocast_enabled("cuda"))
                one.note("evaluate", lambda: length(talks, model, 0.0))
        for temperature in (0.0, 1.0):
            one.note(f"replay, T={temperature}", partial(length, talks, model, temperature))
            one.note(f"decode, T={temperature}", partial(answer, verifier, model, talks.prompts[0], temperature))
    return one.results


def before_ampere(talks: Conversations, name: str) -> dict[str, Any]:
    """Replays in float16 on a GPU without flash kernels."""
    model, _ = talks.build(config_of(name))
    one = Trial()
    with device():
        torch.cuda.get_device_capability = lambda *_: (7, 5)
        has_bf16_products.cache_clear()
        with beside_verifier(torch.bfloat16, CUDA):
            one.note("evaluate in 16 bits", lambda: torch.is_autocast_enabled("cuda"))
        place(model.eval(), CUDA, beside=torch.float16)
        with patch.dict(KERNELS, clear=True):
            one.note("replay, T=0.0", lambda: length(talks, model, 0.0))
    has_bf16_products.cache_clear()
    return one.results


def length(talks: Conversations, model: Any, temperature: float) -> float:
    """The acceptance length of two responses."""
    rows = judged(talks, range(2), temperature=temperature, layer_ids=talks.layer_ids(model.config))
    return float(replay(model, rows, k_max=K, temperature=temperature).counts(K).tau)


def of_family(folder: Path, family: str) -> dict[str, Any]:
    """Captures and decodes with a verifier of another family: the largest gap to the CPU's states, and the tokens."""
    engine, tokens = Engine(make(folder, family), dtype="float32"), torch.tensor([3, 20, 45, 77, 31, 9, 11, 40])

    def states() -> list[torch.Tensor]:
        return [getattr(each, "host", each) for each in engine.capture([tokens, tokens[:5]], (1, 4))[0]]

    def decoded() -> list[int]:
        verifier = CachedVerifier(engine.model)
        return list(decode(verifier, NgramDrafter(), tokens, max_new_tokens=ANSWER, num_tokens=K).tokens)

    one, expected = Trial({"expected": decoded()}), states()
    with device():
        engine.model.to(CUDA)
        engine.device = CUDA
        with repeatable(enabled=True):
            one.note(
                "capture", lambda: max(float((a - b).abs().max()) for a, b in zip(states(), expected, strict=True))
            )
        one.note("decode", decoded)
    return one.results


def answer(verifier: Any, model: Any, prompt: list[int], temperature: float) -> list[int]:
    drafter = model.draft()
    decoded = decode(
        CachedVerifier(verifier, drafter.target_layer_ids),
        drafter,
        torch.tensor(prompt),
        max_new_tokens=ANSWER,
        num_tokens=K,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    return list(decoded.tokens)


def main() -> None:
    torch.set_num_threads(1)
    talks = conversations(Path(tempfile.mkdtemp()))
    verifier = Engine(talks.folder, dtype="float32").model
    with device():
        verifier.to("cuda")
        assert all(isinstance(parameter, CudaTensor) for parameter in verifier.parameters())
    results = {}
    for name in sys.argv[1:] or ALGORITHMS:
        for vocabulary in dict.fromkeys((reduced(name, 256), None)):
            key = f"{name}, {'whole' if vocabulary is None else 'reduced'} vocabulary"
            results[key] = trial(talks, verifier, name, vocabulary)
    results["before Ampere"] = before_ampere(talks, "eagle3")
    verifiers = {family: of_family(Path(tempfile.mkdtemp()), family) for family in VERIFIERS}
    print(json.dumps({"own answer": talks.answers[0][:ANSWER], "cases": results, "verifiers": verifiers}))


if __name__ == "__main__":
    main()
