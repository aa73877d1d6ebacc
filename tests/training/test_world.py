"""One process and two (gloo, started by torchrun) train the same model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from training_launch import CASES, whole_run
from training_toy import MUON, build, make_job, run

from speculators.errors import TrainingError
from speculators.events import SaveEvent
from speculators.training.launch import launch
from speculators.training.shard import gathered_once, shard_over
from speculators.training.world import World, dismiss, repeatable, start, stop, unused_gpus

# Gradients are the same sums in another order: float32 leaves them equal to 1e-7 of their size. AdamW keeps that small:
# 1.2e-7 was measured after six updates of lr = 1e-2. Muon rounds to bf16, where 1e-7 can tip an entry by 2^-8 of it:
# 9e-5 was measured. Other random numbers move weights by 1e-2, Muon on shards instead of whole matrices by 1e-3.
TOLERANCE = {"adamw": 2e-6, "muon": 3e-4, "bf16": 2e-6, "copies": 3e-4, "average": 2e-6, "resumed": 3e-4}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two processes; one of their folders holds a checkpoint that one process left at step 2."""
    folder = tmp_path_factory.mktemp("two")
    for event in run(build(), make_job(folder / "resumed", optimizer=MUON)):
        if isinstance(event, SaveEvent):
            break
    script = Path(__file__).with_name("training_launch.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The results of one process in the same cases."""
    folder = tmp_path_factory.mktemp("one")
    return {name: whole_run(folder / name, World(), **changes) for name, changes in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_one_and_two_processes_reach_the_same_weights(one, two, case):
    """The world size changes no row, random number or weight: only the order of sums differs."""
    for found in two:
        for name, expected in one[case]["weights"].items():
            torch.testing.assert_close(found[case]["weights"][name], expected, rtol=0, atol=TOLERANCE[case])
        assert found[case]["losses"] == pytest.approx(one[case]["losses"], abs=10 * TOLERANCE[case])
        assert found[case]["norms"] == pytest.approx(one[case]["norms"], abs=100 * TOLERANCE[case])
        assert found[case]["taus"] == pytest.approx(one[case]["taus"], abs=100 * TOLERANCE[case])


def test_the_tolerance_would_see_an_error(one):
    """Other random numbers in the forward move the weights by far more than the tolerance."""
    moved = one["adamw"]["weights"]["fc.weight"] - one["bf16"]["weights"]["fc.weight"]
    assert moved.abs().max() > 100 * TOLERANCE["adamw"]


def test_a_checkpoint_of_one_process_is_resumed_by_two(one, two):
    """Two processes resume where one stopped, in weights, optimizer state and rows."""
    for found in two:
        assert len(found["resumed"]["losses"]) == 4
        for name, expected in one["muon"]["weights"].items():
            torch.testing.assert_close(found["resumed"]["weights"][name], expected, rtol=0, atol=TOLERANCE["resumed"])


def test_what_happens_to_one_process_ends_all_of_them_alike(two):
    """A nan, a SIGTERM or a full disk on one process ends both with the same message; none waits for ever."""
    first, second = (found["failures"] for found in two)
    assert first == second
    assert "step 2 of 6: the loss is nan, in row 3 (loss nan; conversations: doc-1-3)" in first["nan"]
    assert "step-00000001" in first["nan"]
    assert first["stop"].startswith("KeyboardInterrupt")
    assert first["left by stop"] == ["step-00000003"]
    assert "the disk is full" in first["disk"]
    assert first["left by disk"] == []


def test_processes_that_built_different_models_are_refused(two):
    """Each process would train a shard of its own model; the error names the first parameters that differ."""
    assert "TrainingError: the processes built different models: " in two[0]["failures"]["seeds"]


def test_without_a_launch_the_world_is_one(monkeypatch):
    """Without torchrun there is no process group, and values pass through the helpers unchanged."""
    monkeypatch.delenv("RANK", raising=False)
    world = start()
    assert (world.rank, world.size, world.backend) == (0, 1, "")
    assert not torch.distributed.is_initialized()
    assert (world.broadcast("x"), world.gather("x")) == ("x", ["x"])
    assert world.sum(torch.ones(1)).item() == 1


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine that says it has eight GPUs, and nothing set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_more_processes_than_gpus_are_refused(eight_gpus, monkeypatch):
    """Both launchers say so before any process computes: a GPU that is not there would fail deep inside of CUDA."""
    with pytest.raises(TrainingError, match=r"9 processes on this machine, and it has 8 GPUs\n--nproc 8"):
        launch(["-c", ""], nproc=9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(TrainingError, match=r"9 processes on this machine, and it has 8 GPUs\n--nproc_per_node=8"):
        start()


def test_gpus_that_are_left_unused_are_named(eight_gpus, monkeypatch):
    """One process on a machine with eight GPUs, and an allocator that wastes memory, each with the remedy."""
    alone = start()
    assert alone.device == torch.device("cuda", 0)
    gpus, memory = unused_gpus(alone)
    assert gpus == "one of 8 GPUs is used: --nproc 8 uses all"
    assert "export PYTORCH_ALLOC_CONF=expandable_segments:True" in memory
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert unused_gpus(World(size=8, device=alone.device)) == []
    assert unused_gpus(World()) == []


def test_cudas_libraries_are_asked_to_repeat_their_sums(eight_gpus, monkeypatch):
    """Set before CUDA reads them, and a user's own values stay."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    start()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"


def test_torch_is_strict_while_training_on_a_gpu():
    """Inside, torch chooses deterministic algorithms and raises where it has none; outside, it is as it was."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with repeatable(enabled=False):
        assert not torch.are_deterministic_algorithms_enabled()
    with suppress(KeyboardInterrupt), repeatable(enabled=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyboardInterrupt
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


@pytest.fixture
def launched(monkeypatch):
    """The world of a launch of one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    world = start()
    yield world
    stop(world)


def test_serial_work_of_rank_0_may_take_days(launched, monkeypatch):
    """Barriers and host values have a group whose timeout outlasts any preparation; tensors keep a short one, so that a
    process that hangs is noticed."""
    patience = {
        name: group._get_backend(torch.device("cpu")).options._timeout
        for name, group in {"data": torch.distributed.group.WORLD, "control": launched.control}.items()
    }
    assert patience["data"] <= timedelta(minutes=30)
    assert patience["control"] >= timedelta(days=7)
    groups = []
    for name in ("barrier", "broadcast_object_list", "all_gather_object", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, group=None, **__: groups.append(group))
    one_of_two = attrs.evolve(launched, size=2)
    one_of_two.barrier()
    one_of_two.broadcast("x")
    one_of_two.gather("x")
    assert groups == [launched.control] * 3
    one_of_two.sum(torch.ones(1))
    assert groups[-1] is None


class Linear(nn.Module):
    """A model whose weights each have the gradient 1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False)])

    def forward(self):
        return self.layers[0](torch.ones(1, 2)).sum()


@pytest.mark.parametrize(("precision", "gradient"), [("fp32", 301), ("bf16", 300)])
def test_rows_accumulate_in_float32_and_only_sums_over_processes_are_rounded(launched, precision, gradient):
    """bf16 has no 301, and a sum in bf16 would stay at 256 when 1 is added."""
    model = Linear()
    shard_over(model, init_device_mesh("cpu", (1,)), gradient_precision=precision)
    with gathered_once(model):
        for _ in range(301):
            model().backward()
    found = model.layers[0].weight.grad.to_local()
    assert found.dtype == torch.float32
    assert found.tolist() == [[gradient] * 2] * 2


def test_the_processes_that_are_not_needed_may_end(launched, monkeypatch):
    """On one machine all leave the launch together, and rank 0 works on alone; on several machines they stay, because
    torchrun would end the agents that keep the launch together."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert dismiss(launched) is launched
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    alone = dismiss(launched)
    assert not torch.distributed.is_initialized()
    assert (alone.rank, alone.size, alone.control) == (0, 1, None)
