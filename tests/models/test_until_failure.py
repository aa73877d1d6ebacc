"""`until_failure`: what a draft's own failure cuts off is not trained, whatever drafts."""

from __future__ import annotations

import pytest
import torch

from speculators.models import anchored, chains
from speculators.models.dflash import DFlashSpeculatorConfig
from speculators.models.dspark import DSparkSpeculatorConfig
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.models.places import running_sum, until_failure

from .proof import check_packed_conversations, fit, gradients

BLOCK = {"num_layers": 1, "block_size": 5, "until_failure": True}
# The module that applies the option, and the config.
CASES = {
    "eagle3": (chains, Eagle3SpeculatorConfig(ttt_steps=4, until_failure=True)),
    "eagle3 with a trained head": (
        chains,
        Eagle3SpeculatorConfig(ttt_steps=4, until_failure=True, lm_head_trainable=True),
    ),
    "dflash": (anchored, DFlashSpeculatorConfig(**BLOCK, weights="exponential")),
    "dflash with d-pace": (anchored, DFlashSpeculatorConfig(**BLOCK)),
    "dspark": (anchored, DSparkSpeculatorConfig(**BLOCK, markov_rank=8)),
}


def kept_by_hand(right, row, depth):
    """Goes through the drafts one by one, row by row and depth by depth."""
    failed, kept = set(), [False] * len(row)
    for index in sorted(range(len(row)), key=lambda i: (int(row[i]), int(depth[i]))):
        kept[index] = int(row[index]) not in failed
        if not right[index]:
            failed.add(int(row[index]))
    return torch.tensor(kept)


def test_a_row_is_kept_up_to_and_including_its_first_failure():
    """Whatever the order of the drafts, and where some depths of a row are not drafted."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(60, generator=generator)[:40]
    row, depth = order // 6, order % 6
    right = torch.rand(40, generator=generator) < 0.7
    kept = until_failure(right, row, depth, rows=10, depths=6)
    assert torch.equal(kept, kept_by_hand(right, row, depth))
    assert 0 < kept.sum() < 40


@pytest.fixture(params=CASES)
def case(world, request):
    """A partly trained model, so that some drafts are right and some are not, with its row and module."""
    module, config = CASES[request.param]
    model, kwargs = world.build(config, 256)
    row = world.row(0, 1, 2)
    fit(model, {**kwargs, "until_failure": False}, row, steps=25)
    return module, model, kwargs, row


def test_nothing_behind_a_failure_gets_a_gradient(case, monkeypatch):
    """The loss moves exactly the drafts up to and including the first wrong one of each row or block."""
    module, model, kwargs, row = case
    seen = []

    def spy(right, group, depth, *, rows, depths):
        seen.append((right, group, depth, rows))
        return until_failure(right, group, depth, rows=rows, depths=depths)

    monkeypatch.setattr(module, "until_failure", spy)
    states, loss, _ = model(**row, **kwargs)
    (grad,) = torch.autograd.grad(loss, states)
    ((right, group, depth, rows),) = seen
    # Chains put drafts without a row into one past the last.
    exists = group < rows - 1 if module is chains else torch.ones_like(right)
    kept = kept_by_hand(right, group, depth) & exists
    assert torch.equal(grad.flatten(0, -2).abs().amax(-1) > 0, kept)
    assert 0 < kept.sum() < exists.sum()


def test_what_is_kept_weighs_what_it_did(case, monkeypatch):
    """If no draft failed, loss and gradients would be those without the option."""
    module, model, kwargs, row = case
    torch.manual_seed(0)
    loss, grads = gradients(model, {**kwargs, "until_failure": False}, row)
    monkeypatch.setattr(module, "until_failure", lambda right, *_, **__: torch.ones_like(right))
    torch.manual_seed(0)
    same_loss, same_grads = gradients(model, kwargs, row)
    # float32 sums in another order.
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for mine, theirs in zip(same_grads, grads, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-7


@pytest.mark.parametrize("name", ["eagle3", "dspark"])
def test_packed_equals_unpacked(world, name):
    """Loss and gradients of a packed row, padded or not, are those of its documents one by one."""
    check_packed_conversations(world, *world.build(CASES[name][1], 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_sums_have_the_bits_of_the_cpus_cumsum(dtype):
    """Sums in a fixed order replaced the CPU's own, which has none on a GPU, without a change of a single bit."""
    values = torch.rand(50, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert torch.equal(running_sum(values), values.cumsum(-1))
    assert running_sum(values[:0]).shape == (0, 16)


def test_failures_are_counted_without_a_float(monkeypatch):
    """A GPU has no deterministic sum of floats along a row, so failures are counted in integers."""
    cumsum, kinds = torch.Tensor.cumsum, set()
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: kinds.add(self.dtype) or cumsum(self, dim))
    until_failure(torch.tensor([True, False]), torch.tensor([0, 0]), torch.tensor([0, 1]), rows=1, depths=2)
    assert kinds == {torch.int64}
