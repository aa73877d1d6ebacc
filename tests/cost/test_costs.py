"""What `spec plan` tells of costs: counts that can be checked by hand, bounds that say so, and wrong options."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Spec
from torch.profiler import ProfilerActivity, profile

from speculators.contract import build_model, trainer_kwargs
from speculators.cost.devices import parse_devices
from speculators.cost.trace import trace
from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.facts import VerifierFacts
from speculators.nn.layout import RowLayout
from speculators.pipeline.arguments import training_kwargs
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan
from speculators.training import loop
from speculators.training.optimizer import Optimizer
from speculators.training.update import UpdateResult, Worker

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama-3.1-8b" / "config.json"


@pytest.fixture(scope="module")
def llama_plan(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """EAGLE-3 for Llama-3.1-8B on eight GPUs and on sixteen, from its config.json alone."""
    spec = Spec(tmp_path_factory.mktemp("plan"))
    told = spec(
        *("plan", "eagle3_llama8b", "--verifier-config", LLAMA, "--gpus", "8xH100-80GB,16xH100"),
        *("--conversations", 1000, "--mean-tokens", 1024, "--simulate", "--nodes", 4, "--json"),
    )
    assert told.code == 0, told.err
    return told.json


def test_the_verifier_is_counted_from_its_config(llama_plan: dict) -> None:
    """8,030,261,248 parameters as published; a token meets all matrices of the 32 layers once."""
    verifier = llama_plan["costs"]["verifier"]
    assert verifier["parameters"] == 8_030_261_248
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14_336
    # Of grouped keys all 32 heads are multiplied: two products of 4096 a key and layer.
    assert verifier["products"] == 32 * layer
    assert verifier["attention"] == 4 * 4096 * 32


def test_twice_the_processes_hold_smaller_shards(llama_plan: dict) -> None:
    """Sharded optimizer state halves; activations of a row stay."""
    eight, sixteen = (device["memory"] for device in llama_plan["costs"]["devices"])
    assert sixteen["optimizer"] == pytest.approx(eight["optimizer"] / 2, rel=0.01)
    assert sixteen["activations"] == eight["activations"]


def test_expectations_of_prepared_data_are_not_used_and_it_says_so(spec: Spec, run_folder: Path) -> None:
    """What was counted is told."""
    told = spec("plan", "smoke", "--runs", spec.runs, "--conversations", 5, "--json").json["costs"]
    assert told["amount"]["counted"]
    assert "--conversations not used: the data is prepared" in told["warnings"][0]


def test_bounds_of_unprepared_data_say_so(llama_plan: dict) -> None:
    """Two epochs of at most 1000 x 1024 tokens, in updates of 65,536."""
    data = llama_plan["costs"]["amount"]
    assert (data["tokens"], data["counted"]) == (1_024_000, False)
    assert data["updates"] == 2 * 16


def test_a_simulation_never_exceeds_linear_growth(llama_plan: dict) -> None:
    """Communication only adds: tokens a second and node fall from one node to two and four."""
    rates = [row["tokens_per_second"] / row["nodes"] for row in llama_plan["costs"]["simulation"]["rows"]]
    assert len(rates) == 3
    assert rates == sorted(rates, reverse=True)


def test_a_simulation_says_which_devices_it_is_of(llama_plan: dict) -> None:
    """The first of several."""
    simulation = llama_plan["costs"]["simulation"]
    assert simulation["device"] == "8xH100-80GB"
    assert "nodes of 8xH100-80GB, the first of --gpus," in simulation["notes"][0]


def stored(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_disk_and_memory_are_those_of_a_run(
    optimizer: str, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 10%: what two updates leave on disk, and the tensors that are there in an update.

    The draft's feed-forward is made wide: of smoke's own, the file format would be a tenth.
    """
    held: dict[str, int] = {}
    step, update = Optimizer.step, loop.update

    def noted_step(self: Optimizer, factor: float) -> None:
        held["gradients"] = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        step(self, factor)

    def noted_update(worker: Worker, *arguments: Any, **named: Any) -> UpdateResult:
        outcome = update(worker, *arguments, **named)
        held["weights"] = sum(parameter.nbytes for parameter in worker.model.parameters())
        held["optimizer"] = sum(tensor.nbytes for tensor in worker.optimizer.tensors().values())
        held["verifier"] = sum(tensor.nbytes for tensor in worker.model.target_head.buffers())
        return outcome

    monkeypatch.setattr(Optimizer, "step", noted_step)
    monkeypatch.setattr(loop, "update", noted_update)
    sets = [
        *("algorithm.decoder={intermediate_size=2048}", f"schedule.optimizer.name='{optimizer}'"),
        *("schedule.max_steps=2", "schedule.checkpoint_every=1", "schedule.evaluate_every=2"),
        *("benchmark.num_speculative_tokens=[1]", "benchmark.max_new_tokens=2", "benchmark.live_prompts=1"),
    ]
    options = ["--runs", tmp_path, *(part for text in sets for part in ("--set", text))]
    assert (told := spec("run", "smoke", *options, "--quiet")).code == 0, told.err
    plan = spec("plan", "smoke", *options, "--json").json
    (run,) = tmp_path.glob("smoke-*")
    key = next(stage["fingerprint"] for stage in plan["stages"] if stage["name"] == "capture")
    disk = plan["costs"]["disk"]
    assert disk["hidden states"] == pytest.approx(stored(spec.cache / "states" / key[:16]), rel=0.1)
    assert disk["checkpoints"] == pytest.approx(stored(run / "checkpoints"), rel=0.1)
    assert disk["speculator"] == pytest.approx(stored(run / "speculator"), rel=0.1)
    memory = plan["costs"]["devices"][0]["memory"]
    assert {part: memory[part] for part in held} == pytest.approx(held, rel=0.1)


def most_allocated(work: Callable[[], None]) -> int:
    """The most bytes that torch's allocator had given out at once in `work`, as its own profiler tells."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        work()
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("recipe", "sets"),
    [
        ("smoke", ["algorithm.draft_vocab_size='none'"]),
        ("quickstart_dflash", ["verifier.model='tiny:0'", "verifier.sha256='none'", "algorithm.draft_vocab_size=128"]),
    ],
)
def test_activations_and_chunk_buffers_are_those_of_a_row(
    recipe: str, sets: list[str], precision: str, tiny_verifier: Path
) -> None:
    """Within 10%, by the allocator's own account of one row's forward and backward on real tensors.

    The first row's gradients are there already, as an update's second row finds them.
    """
    rows = [
        "data.max_tokens=512",
        "schedule.row_tokens=1024",
        "schedule.tokens_per_step=1024",
        f"schedule.precision='{precision}'",
    ]
    plan = make_plan(load_recipe(recipe, [*sets, *rows]), VerifierFacts.read(tiny_verifier / "config.json"))
    lengths, width = [300, 424, 300], plan.facts.hidden_size
    told = trace(plan, lengths, 0.5)
    reduced = plan.draft_vocab_size < plan.facts.vocab_size
    kwargs = training_kwargs(plan, str(tiny_verifier), torch.arange(plan.draft_vocab_size) if reduced else None)
    model = build_model(plan.recipe.algorithm.name, plan.facts, kwargs)
    given, _ = trainer_kwargs(model, kwargs)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    items = []
    for length in lengths:
        encoded = Encoded(np.zeros(length, np.int32), np.arange(length) >= length // 2)
        states = [torch.randn(length, columns) for columns in (len(plan.target_layer_ids) * width, width)]
        items.append((encoded, (states[0], states[1])))
    row = build_row(items, widths=(0, 0), dtype=dtype)
    layout = RowLayout.of(row["document_ids"], row["loss_mask"])

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            _, loss, _ = model(**row, layout=layout, **given)
        loss.backward()

    step()
    assert told.activation_bytes + told.chunk_bytes == pytest.approx(most_allocated(step), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "8xH1000"), "did you mean 'H100'"),
        (("--gpus", "0xH100"), "must be like 8xH100-80GB"),
        (("--simulate",), "goes with --gpus"),
        (("--efficiency", "2"), "above 0 and at most 1"),
        (("--gpus", "8xH100-0GB"), "numbers from 1"),
        (("--gpus", "1xH100", "--bandwidths", "1,2"), "--simulate"),
        (("--gpus", "1xH100", "--simulate", "--bandwidths", "nan,1,1"), "three finite numbers"),
        (("--gpus", "1xH100", "--simulate", "--bandwidths", "1,inf,1"), "three finite numbers"),
        (("--mean-tokens", "2049"), "at most data.max_tokens = 2048"),
    ],
)
def test_a_wrong_option_is_one_error(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """It names the option."""
    told = Spec(tmp_path)("plan", "eagle3_llama8b", "--verifier-config", LLAMA, *arguments)
    assert told.code == 2
    assert words in told.err
    assert "Traceback" not in told.err


def test_a_device_has_its_usual_memory_unless_told() -> None:
    """In units of 1000."""
    usual, told = parse_devices("H100, 2xh100-94GB")
    assert (usual.count, usual.memory_bytes) == (1, 80e9)
    assert (told.count, told.memory_bytes) == (2, 94e9)
