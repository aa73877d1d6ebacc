"""The rounds that a draft saves: the gradient of the recurrence, and the difference of two walks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speculators.bench.walk import walk
from speculators.models import chains
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.models.walk import responses_of, rounds_saved, walk_weights
from speculators.nn.layout import RowLayout

from .proof import check_empty_row, fit, gradients, with_padding

# float64 sums of at most a few hundred terms in another order.
TOLERANCE = 1e-9
LENGTHS = (1, 2, 9, 30, 3)


def random_walks(depths, seed=0):
    """Acceptance [K, N] by place of five responses, some of it 0 or 1, and the response of each place."""
    generator = torch.Generator().manual_seed(seed)
    responses = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    accepted = torch.rand(depths, len(responses), generator=generator, dtype=torch.float64) * 1.4 - 0.2
    return accepted.clamp(0, 1), responses


def tables(accepted, responses):
    """The same as bench takes it: for each response [L, K], by anchor and depth, 0 past its end."""
    found = []
    for response in range(len(LENGTHS)):
        own = accepted[:, responses == response]
        length = own.shape[1]
        rows = [
            [own[k, i + k] if i + k < length else own.new_zeros(()) for k in range(len(own))] for i in range(length)
        ]
        found.append(torch.stack([torch.stack(row) for row in rows]))
    return found


def expected_rounds(table):
    """R[0] by the definition, differentiable."""
    length, depths = table.shape
    rounds = [table.new_zeros(())] * (length + depths + 1)
    for i in reversed(range(length)):
        survive = [table.new_ones(()), *table[i].cumprod(0), table.new_zeros(())]
        rounds[i] = 1 + sum((survive[j] - survive[j + 1]) * rounds[i + j + 1] for j in range(depths + 1))
    return rounds[0]


@pytest.mark.parametrize("depths", [1, 5, 60])
def test_the_rounds_saved_are_the_gradient_of_the_recurrence(depths):
    """They equal minus the gradient that autograd finds through R, for every place and depth."""
    accepted, responses = random_walks(depths)
    accepted.requires_grad_()
    total = sum(expected_rounds(table) for table in tables(accepted, responses))
    (grad,) = torch.autograd.grad(total, accepted)
    saved = rounds_saved(accepted.detach(), responses)
    assert (saved + grad).abs().max() < TOLERANCE
    # Some acceptance leads to an anchor from which more rounds are needed.
    assert depths == 1 or (saved < 0).any()


@pytest.mark.parametrize("depths", [1, 3])
def test_a_draft_saves_the_rounds_that_the_benchmark_counts_less(depths):
    """Each entry equals the rounds of the benchmark's walk with the draft rejected, less those with it accepted."""
    accepted, responses = random_walks(depths, seed=1)

    def rounds(depth, place, value):
        changed = accepted.clone()
        changed[depth, place] = value
        return walk([np.array(table) for table in tables(changed, responses)], depths).rounds.sum()

    saved = rounds_saved(accepted, responses)
    for depth in range(depths):
        for place in range(len(responses)):
            difference = rounds(depth, place, 0.0) - rounds(depth, place, 1.0)
            assert float(saved[depth, place]) == pytest.approx(difference, abs=TOLERANCE), (depth, place)


def test_the_weights_have_a_mean_of_one_and_none_is_negative():
    """They are proportional to the rounds saved where these are positive; drafts that do not exist weigh nothing."""
    accepted, responses = random_walks(4, seed=2)
    valid = torch.rand(accepted.shape, generator=torch.Generator().manual_seed(3)) < 0.9
    weights = walk_weights(accepted, valid, responses)
    saved = rounds_saved(torch.where(valid, accepted, 0.0), responses)
    counted = valid & (saved > 0)
    assert (weights >= 0).all()
    assert float(weights[valid].mean()) == pytest.approx(1.0)
    assert torch.equal(weights > 0, counted)
    ratio = weights[counted] / saved[counted]
    assert float((ratio / ratio[0] - 1).abs().max()) < TOLERANCE


def test_where_nothing_can_be_saved_the_weights_are_zero():
    """A row without supervised places, and responses of one token, which take one round whatever is drafted."""
    for count in (0, 3):
        accepted, valid = torch.full((2, count), 0.5), torch.ones(2, count, dtype=torch.bool)
        assert torch.equal(walk_weights(accepted, valid, torch.arange(count)), torch.zeros(2, count))


def test_a_response_ends_with_its_turn_and_with_its_document():
    """Turns of one conversation are responses of their own, and so are neighbouring places of two documents."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1, 0]], dtype=torch.bool)
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    assert responses_of(RowLayout.of(documents, mask)).tolist() == [0, 0, 1, 1, 2, 3]
    assert responses_of(RowLayout.of(documents, torch.zeros_like(mask))).tolist() == []


@pytest.mark.parametrize("trained", [False, True])
def test_training_weighs_drafts_by_the_rounds_they_save(world, monkeypatch, trained):
    """Drafts count by the rounds that acceptance, sum min(p, q), saves, with a frozen head and with a trained one."""
    config = Eagle3SpeculatorConfig(weights="walk", lm_head_trainable=trained, ttt_gamma=0.5)
    model, kwargs = world.build(config, 256)
    row = world.row(0, 1, 2)
    fit(model, {**kwargs, "weights": "depth"}, row, steps=25)
    seen = []
    monkeypatch.setattr(chains, "walk_weights", lambda *args: seen.append((args, walk_weights(*args))) or seen[-1][1])
    states, loss, _ = model(**row, **kwargs)
    (grad,) = torch.autograd.grad(loss, states)
    (((accepted, valid, responses), weights),) = seen
    head = model.target_head
    q = model.logits(states.detach()).detach().softmax(-1)  # [K, N, D]
    places = torch.nonzero(row["loss_mask"][0])[:, 0]
    p = head.logits(row["verifier_last_hidden_states"][0][places - 1]).softmax(-1)
    torch.testing.assert_close(accepted, torch.minimum(p, q).sum(-1), rtol=0, atol=1e-5)
    assert responses.tolist() == row["document_ids"][0][places].tolist()
    assert torch.equal(grad.abs().amax(-1) > 0, weights > 0)
    kl = (p * (p.log() - q.log())).sum(-1)
    by_depth = torch.tensor([0.5**depth for depth in range(3)])[:, None] / len(places)
    assert float(loss.detach()) == pytest.approx(float((by_depth * weights * kl)[valid].sum()), rel=1e-4)


def test_padding_changes_nothing_and_an_empty_row_is_zero(world):
    """Padding between documents leaves loss and gradients as they are; a row without supervised tokens has none."""
    model, kwargs = world.build(Eagle3SpeculatorConfig(weights="walk", until_failure=True), 256)
    row = world.row(0, 1)
    loss, grads = gradients(model, kwargs, row)
    padded_loss, padded = gradients(model, kwargs, with_padding(row))
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    assert all((mine - theirs).abs().max() < 1e-5 for mine, theirs in zip(padded, grads, strict=True))
    check_empty_row(world, model, kwargs)
