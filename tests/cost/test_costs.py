"""The costs that `spec plan` shows: counts that can be checked by hand, labelled upper bounds, and wrong options."""

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
from speculators.cost.catalogue import parse_devices
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
    output = spec(
        *("plan", "eagle3_llama8b", "--verifier-config", LLAMA, "--gpus", "8xH100-80GB,16xH100"),
        *("--conversations", 1000, "--mean-tokens", 1024, "--json"),
    )
    assert output.code == 0, output.err
    return output.json


def test_the_verifier_is_counted_from_its_config(llama_plan: dict) -> None:
    """8,030,261,248 parameters as published; a token meets all matrices of the 32 layers once."""
    verifier = llama_plan["costs"]["verifier"]
    assert verifier["parameters"] == 8_030_261_248
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14_336
    # Grouped keys are multiplied with all 32 heads: two products of 4096 per key and layer.
    assert verifier["products"] == 32 * layer
    assert verifier["attention"] == 4 * 4096 * 32


def test_twice_the_processes_hold_smaller_shards(llama_plan: dict) -> None:
    """The sharded optimizer state halves; the activations of a row do not change."""
    eight, sixteen = (device["memory"] for device in llama_plan["costs"]["devices"])
    assert sixteen["optimizer"] == pytest.approx(eight["optimizer"] / 2, rel=0.01)
    assert sixteen["activations"] == eight["activations"]


def test_prepared_data_replaces_expected_figures(spec: Spec, run_folder: Path) -> None:
    """The plan shows the counted figures instead, and says so."""
    costs = spec("plan", "smoke", "--runs", spec.runs, "--conversations", 5, "--json").json["costs"]
    assert costs["amount"]["counted"]
    assert "--conversations ignored: the data is already prepared" in costs["warnings"][0]


def test_costs_of_unprepared_data_are_shown_as_bounds(llama_plan: dict) -> None:
    """Two epochs of at most 1000 x 1024 tokens, in updates of 65,536, are shown as upper bounds."""
    data = llama_plan["costs"]["amount"]
    assert (data["tokens"], data["counted"]) == (1_024_000, False)
    assert data["updates"] == 2 * 16


def stored(folder: Path) -> int:
    """Adds up the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_disk_and_memory_are_those_of_a_run(
    optimizer: str, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimates are within 10% of the files that two updates leave on disk, and of the tensors that exist during
    an update.

    The draft's feed-forward is made wide, because the file format would add a tenth to smoke's own.
    """
    measured: dict[str, int] = {}
    step, update = Optimizer.step, loop.update

    def noted_step(self: Optimizer, factor: float) -> None:
        measured["gradients"] = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        step(self, factor)

    def noted_update(worker: Worker, *arguments: Any, **named: Any) -> UpdateResult:
        outcome = update(worker, *arguments, **named)
        measured["weights"] = sum(parameter.nbytes for parameter in worker.model.parameters())
        measured["optimizer"] = sum(tensor.nbytes for tensor in worker.optimizer.tensors().values())
        measured["verifier"] = sum(tensor.nbytes for tensor in worker.model.target_head.buffers())
        return outcome

    monkeypatch.setattr(Optimizer, "step", noted_step)
    monkeypatch.setattr(loop, "update", noted_update)
    sets = [
        *("algorithm.decoder={intermediate_size=2048}", f"schedule.optimizer.name='{optimizer}'"),
        *("schedule.max_steps=2", "schedule.checkpoint_every=1", "schedule.evaluate_every=2"),
        *("benchmark.num_speculative_tokens=[1]", "benchmark.max_new_tokens=2", "benchmark.live_prompts=1"),
    ]
    options = ["--runs", tmp_path, *(part for text in sets for part in ("--set", text))]
    output = spec("run", "smoke", *options, "--quiet")
    assert output.code == 0, output.err
    plan = spec("plan", "smoke", *options, "--json").json
    (run,) = tmp_path.glob("smoke-*")
    key = next(stage["fingerprint"] for stage in plan["stages"] if stage["name"] == "capture")
    disk = plan["costs"]["disk"]
    assert disk["hidden states"] == pytest.approx(stored(spec.cache / "states" / key[:16]), rel=0.1)
    assert disk["checkpoints"] == pytest.approx(stored(run / "checkpoints"), rel=0.1)
    assert disk["speculator"] == pytest.approx(stored(run / "speculator"), rel=0.1)
    memory = plan["costs"]["devices"][0]["memory"]
    assert {part: memory[part] for part in measured} == pytest.approx(measured, rel=0.1)


def most_allocated(work: Callable[[], None]) -> int:
    """Measures with torch's profiler the most bytes that its allocator had given out at once during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
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
    """The estimate is within 10% of the allocator's own account of one row's forward and backward on real tensors.

    Gradients of a first row exist already, as for the second row of an update.
    """
    rows = [
        "data.max_tokens=512",
        "schedule.row_tokens=1024",
        "schedule.tokens_per_step=1024",
        f"schedule.precision='{precision}'",
    ]
    plan = make_plan(load_recipe(recipe, [*sets, *rows]), VerifierFacts.read(tiny_verifier / "config.json"))
    lengths, width = [300, 424, 300], plan.facts.hidden_size
    traced = trace(plan, lengths, 0.5, kind="cpu")
    reduced = plan.draft_vocab_size < plan.facts.vocab_size
    kwargs = training_kwargs(plan, str(tiny_verifier), torch.arange(plan.draft_vocab_size) if reduced else None)
    model = build_model(plan.recipe.algorithm.name, plan.facts, kwargs)
    train_kwargs, _ = trainer_kwargs(model, kwargs)
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
            _, loss, _ = model(**row, layout=layout, **train_kwargs)
        loss.backward()

    step()
    assert traced.activation_bytes + traced.chunk_bytes == pytest.approx(most_allocated(step), rel=0.1)


def test_anchors_are_drawn_alike_in_every_plan(tiny_verifier: Path) -> None:
    """Two plans state the same figures, and the numbers that are drawn afterwards do not change."""
    sets = ["verifier.model='tiny:0'", "verifier.sha256='none'", "algorithm.draft_vocab_size=128"]
    recipe = load_recipe("quickstart_dflash", [*sets, "algorithm.max_anchors=16", "data.max_tokens=512"])
    plan = make_plan(recipe, VerifierFacts.read(tiny_verifier / "config.json"))
    before = torch.get_rng_state()
    first = trace(plan, [300, 424, 300], 0.5, kind="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert trace(plan, [300, 424, 300], 0.5, kind="cpu") == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8xH1000"), "did you mean 'H100'"),
        (("--gpus", "0xH100"), "must be like 8xH100-80GB"),
        (("--efficiency", "0.5"), "--efficiency: requires --gpus"),
        (("--efficiency", "2"), "above 0 and at most 1"),
        (("--gpus", "8xH100-0GB"), "numbers from 1"),
        (("--mean-tokens", "4097"), "at most data.max_tokens = 4096"),
    ],
)
def test_a_wrong_option_is_one_error(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """The error names the option."""
    output = Spec(tmp_path)("plan", "eagle3_llama8b", "--verifier-config", LLAMA, *arguments)
    assert output.code == 2
    assert message in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    "cures",
    [
        ("distributed.shard_verifier = true", 'data.hidden_states = "cached"'),
        ('data.regenerate = "none"', 'data.hidden_states = "server"', "data.server.evaluate = true"),
    ],
)
def test_a_verifier_that_is_too_large_comes_with_the_ways_that_work(cures: tuple[str, ...], tmp_path: Path) -> None:
    """70B on 80 GB: what the warning says to set raises no such warning itself."""
    config = LLAMA.parents[1] / "llama-3.3-70b" / "config.json"
    plan = ("plan", "eagle3_llama70b", "--verifier-config", config, "--gpus", "8xH100-80GB", "--json")
    plan += ("--set", "distributed.shard_verifier = false")
    (too_large,) = [each for each in Spec(tmp_path)(*plan).json["costs"]["warnings"] if "verifier alone" in each]
    assert all(cure in too_large for cure in cures)
    cured = Spec(tmp_path)(*plan, *(part for cure in cures for part in ("--set", cure)))
    assert cured.code == 0, cured.err
    assert not [each for each in cured.json["costs"]["warnings"] if "verifier alone" in each]


def test_processes_that_share_a_verifier_hold_parts_of_its_layers(tmp_path: Path) -> None:
    """Of 141 GB in bf16, 4.2 GB are embeddings and head; a layer has 1.7 GB, and two are gathered at once."""
    config = LLAMA.parents[1] / "llama-3.3-70b" / "config.json"
    plan = ("plan", "eagle3_llama70b", "--verifier-config", config, "--gpus", "1xH200,8xH200", "--json")
    whole, shared = (each["memory_verifier"] for each in Spec(tmp_path)(*plan).json["costs"]["devices"])
    assert whole - shared == pytest.approx(141.1e9 - (141.1e9 / 8 + 4.2e9 + 2 * 1.71e9), rel=1e-2)


def test_a_served_verifier_leaves_the_gpus_to_training(tmp_path: Path) -> None:
    """70B, 8x80 GB: the draft's 1.1 billion parameters in float32, half of the GPU free, and of the verifier no more
    than the head's rows of the draft vocabulary. Without a server, answers alone need it."""
    config = LLAMA.parents[1] / "llama-3.3-70b" / "config.json"
    sets = ('data.hidden_states="streamed"', "data.server.evaluate=true", "distributed.shard_verifier=false")
    plan = ("plan", "eagle3_llama70b", "--verifier-config", config, "--gpus", "8xH100-80GB", "--mean-tokens", 1024)
    plan += (*(part for each in sets for part in ("--set", each)), "--json")
    answering = Spec(tmp_path)(*plan).json["costs"]
    assert answering["devices"][0]["memory_verifier"] > 141e9
    assert any("it cannot answer there" in each for each in answering["warnings"])
    served = Spec(tmp_path)(*plan, "--set", 'data.regenerate="none"').json["costs"]
    assert served["warnings"] == []
    assert (served["disk"]["hidden states"], served["devices"][0]["memory_verifier"]) == (0, 0)
    memory, trainable = served["devices"][0]["memory"], served["row"]["trainable"]
    assert memory["gradients"] == pytest.approx(4 * trainable * 9 / 8)
    assert memory["optimizer"] == pytest.approx(8 * trainable / 8)
    assert memory["verifier"] == pytest.approx(2 * 32_000 * 8192, rel=1e-3)
    assert 30e9 < served["devices"][0]["memory_total"] < 45e9


def communication_of(spec: Spec, *sets: str) -> dict[str, int]:
    """What one of 32 GPUs receives per update."""
    options = ("--gpus", "32xH100", "--set", "schedule.tokens_per_step=131072", "--json")
    plan = spec(
        "plan", "eagle3_llama8b", "--verifier-config", LLAMA, *options, *(p for each in sets for p in ("--set", each))
    )
    assert plan.code == 0, plan.err
    if any('"node"' in each for each in sets):
        assert any("8 GPUs per machine are assumed" in note for note in plan.json["costs"]["notes"])
    (device,) = plan.json["costs"]["devices"]
    return device["communication"]


def test_shards_within_machines_gather_within_them(tmp_path: Path) -> None:
    """Each of 32 GPUs receives 7/8 of weights and gradients from its own machine, and 2 x 3/4 of its eighth of the
    gradients from the three others; in bf16 gradients have half the size, and copies exchange gradients alone."""
    spec = Spec(tmp_path)
    over_all = communication_of(spec)
    whole = over_all["weights"] * 32 / 31
    near = communication_of(spec, 'distributed.shard="node"')
    assert near["weights"] == pytest.approx(whole * 7 / 8)
    assert near["gradients"] == pytest.approx(whole * (7 / 8 + 2 * 3 / 4 / 8))
    narrow = communication_of(spec, 'distributed.shard="node"', 'schedule.gradient_precision="bf16"')
    assert narrow == {**near, "gradients": pytest.approx(near["gradients"] / 2, abs=2)}
    copies = communication_of(spec, "distributed.shard=false")
    assert copies == {"gradients": pytest.approx(2 * whole * 31 / 32)}


def test_a_device_has_its_usual_memory_unless_it_is_named() -> None:
    """Sizes are in units of 1000."""
    usual, named = parse_devices("H100, 2xh100-94GB")
    assert (usual.count, usual.memory_bytes) == (1, 80e9)
    assert (named.count, named.memory_bytes) == (2, 94e9)
