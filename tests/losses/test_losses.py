"""Every loss, and the fused head, equal plain autograd in float64."""

from __future__ import annotations

import attrs
import pytest
import torch

from speculators.chunks import CHUNKS
from speculators.errors import RegistryError
from speculators.losses import LOSSES, Draft, Target, acceptance, head_loss, mixture, place_loss, top_k
from speculators.losses.fused import product_rows

# float64 against float64; sums of at most a few thousand terms.
TOLERANCE = 1e-9


def plain(name, z, t):
    """The definition, differentiated by autograd."""
    p, q = t.softmax(-1), z.softmax(-1)
    log_p, log_q = t.log_softmax(-1), z.log_softmax(-1)
    alpha = torch.minimum(p, q).sum(-1)
    mu = (p + q) / 2
    kl = (p * (log_p - log_q)).sum(-1)
    return {
        "kl_div": kl,
        "rkl": (q * (log_q - log_p)).sum(-1),
        "jsd": 0.5 * (p * (log_p - mu.log())).sum(-1) + 0.5 * (q * (log_q - mu.log())).sum(-1),
        "ce": -log_q.gather(-1, p.argmax(-1, keepdim=True))[..., 0],
        "tv": 1 - alpha,
        "nla": -alpha.clamp_min(1e-5).log(),
        "lk_hybrid": (s := (-3 * alpha).exp().detach()) * kl + (1 - s) * (1 - alpha),
    }[name]


def logits(rows=50, vocab=40, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale for _ in range(2)]


def test_the_list_of_losses_is_whole():
    """Every loss that the field trains with is registered."""
    assert LOSSES.names() == sorted(["kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid"])


@pytest.mark.parametrize("name", ["kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid"])
def test_value_and_gradient_equal_autograd(name):
    """Each loss and its closed-form gradient equal the definition differentiated by autograd."""
    z, t = logits()
    z.requires_grad_()
    wanted = plain(name, z, t)
    (grad,) = torch.autograd.grad(wanted.sum(), z)
    value, closed = LOSSES.get(name)(Draft(z.detach()), Target(t))
    assert (value - wanted).abs().max() < TOLERANCE
    assert (closed - grad).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid"])
def test_float32_stays_finite_on_extreme_logits(name):
    """Logits 200 apart, where probabilities underflow, give finite losses and gradients."""
    z, t = (x.float() * 60 for x in logits())
    value, grad = LOSSES.get(name)(Draft(z), Target(t))
    assert value.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_the_top_k_loss_is_a_cross_entropy_of_the_likeliest_tokens_alone(k):
    """Value and gradient equal the definition differentiated by autograd; of all tokens it is KL plus p's entropy."""
    z, t = logits()
    z.requires_grad_()
    p, log_q = t.softmax(-1), z.log_softmax(-1)
    kept = (p >= p.sort(-1, descending=True).values[:, [min(k, 40) - 1]]).double()
    wanted = -(kept * p * log_q).sum(-1)
    (grad,) = torch.autograd.grad(wanted.sum(), z)
    value, closed = top_k(k)(Draft(z.detach()), Target(t))
    assert (value - wanted).abs().max() < TOLERANCE
    assert (closed - grad).abs().max() < TOLERANCE
    if k >= 40:
        entropy = -(p * t.log_softmax(-1)).sum(-1)
        assert (value - entropy - LOSSES.get("kl_div")(Draft(z.detach()), Target(t))[0]).abs().max() < TOLERANCE
    value, closed = top_k(k)(Draft(z.detach().float() * 60), Target(t.float() * 60))
    assert value.isfinite().all()
    assert closed.isfinite().all()


def test_equal_distributions_cost_nothing():
    """At q = p every divergence and its gradient are 0."""
    z, _ = logits()
    for name in ("kl_div", "rkl", "jsd", "tv", "nla", "lk_hybrid"):
        value, grad = LOSSES.get(name)(Draft(z), Target(z.clone()))
        assert value.abs().max() < TOLERANCE, name
        assert grad.abs().max() < TOLERANCE, name


def test_mixture_is_the_weighted_sum():
    """A mixture adds values and gradients with its weights."""
    z, t = logits()
    draft, target = Draft(z), Target(t)
    value, grad = mixture({"ce": 0.1, "tv": 0.9})(draft, target)
    parts = [LOSSES.get(name)(draft, target) for name in ("ce", "tv")]
    assert (value - 0.1 * parts[0][0] - 0.9 * parts[1][0]).abs().max() < TOLERANCE
    assert (grad - 0.1 * parts[0][1] - 0.9 * parts[1][1]).abs().max() < TOLERANCE


def test_unknown_loss_names_the_near_miss():
    """A misspelt loss is an error that suggests the right one."""
    with pytest.raises(RegistryError, match="did you mean 'kl_div'"):
        mixture({"kl_dif": 1.0})


@pytest.mark.parametrize("loss", [{"kl_div": 1.0}, {"ce": 0.1, "tv": 0.9}])
@pytest.mark.parametrize("rows", [192, 21, 1])
def test_fused_head_equals_plain(loss, rows, monkeypatch):
    """Computing in parts gives the values, and the gradients of states and head, of computing all logits at once."""
    small = attrs.evolve(CHUNKS["cpu"], product_rows=rows, softmax_elements=4 * 40)
    monkeypatch.setitem(CHUNKS, "cpu", small)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    states, head, t, weights = randn(3, 20, 16), randn(40, 16), randn(20, 40) * 2, randn(3, 20).abs()
    states.requires_grad_()
    head.requires_grad_()
    wanted = torch.stack(
        [
            sum(w * (plain(n, s @ head.T, t) * r).sum() for n, w in loss.items())
            for s, r in zip(states, weights, strict=True)
        ]
    )
    wanted_grads = torch.autograd.grad(2.5 * wanted.sum(), (states, head))
    result = head_loss(states, head, weights, lambda rows: t[rows], mixture(loss))
    got_grads = torch.autograd.grad(2.5 * result.per_depth.sum(), (states, head))
    assert (result.per_depth - wanted).abs().max() < TOLERANCE
    for mine, theirs in zip(got_grads, wanted_grads, strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE
    right = (states @ head.T).argmax(-1) == t.argmax(-1)
    assert torch.equal(result.right, right)


@pytest.mark.parametrize("rows", [192, 35, 1])
def test_each_depth_can_have_a_head_of_its_own(rows, monkeypatch):
    """Values and gradients are those of one call a head, while the verifier's logits are computed once for all."""
    monkeypatch.setitem(CHUNKS, "cpu", attrs.evolve(CHUNKS["cpu"], product_rows=rows, softmax_elements=4 * 40))
    generator = torch.Generator().manual_seed(6)
    states, heads, t, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 20, 16), (3, 40, 16), (20, 40), (3, 20))
    )
    states.requires_grad_()
    heads = [head.clone().requires_grad_() for head in heads]
    loss, projected = mixture({"ce": 0.1, "tv": 0.9}), []

    def target(places):
        projected.extend(range(20)[places])
        return t[places]

    alone = [
        head_loss(states[depth : depth + 1], heads[depth], weights[depth : depth + 1], target, loss)
        for depth in range(3)
    ]
    projected.clear()
    together = head_loss(states, heads, weights, target, loss)
    assert projected == list(range(20))
    assert torch.equal(together.right, torch.cat([each.right for each in alone]))
    sums = (3.0 * together.per_depth.sum(), 3.0 * sum(each.per_depth.sum() for each in alone))
    mine, theirs = (torch.autograd.grad(total, (states, *heads)) for total in sums)
    assert abs(sums[0] - sums[1]) < TOLERANCE
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("device_type", CHUNKS)
def test_a_product_is_bounded_for_any_vocabulary(device_type):
    """Logits of 152k tokens exist for fewer rows, not in more memory."""
    for vocab in (128, 32_000, 151_936, 262_144):
        rows = product_rows(vocab, device_type)
        assert 1 <= rows <= CHUNKS[device_type].product_rows
        assert rows * vocab <= CHUNKS[device_type].product_elements


def test_frozen_head_gets_no_gradient():
    """With a frozen head only the states get a gradient."""
    states = torch.randn(1, 4, 8, requires_grad=True)
    head = torch.randn(10, 8)
    target = torch.randn(4, 10)
    head_loss(
        states, head, torch.ones(1, 4), lambda rows: target[rows], mixture({"kl_div": 1.0})
    ).per_depth.sum().backward()
    assert states.grad is not None
    assert head.grad is None


def test_a_head_can_be_frozen_in_part():
    """Frozen columns are read but get no gradient; the others and the states get the gradients of the whole head."""
    generator = torch.Generator().manual_seed(5)
    states, head, t = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 20, 16), (40, 16), (20, 40))
    )
    states.requires_grad_()
    found = {}
    for columns in (0, 10):
        weight = head[:, columns:].clone().requires_grad_()
        frozen = head[:, :columns] if columns else None
        result = head_loss(
            states, weight, torch.ones(2, 20).double(), lambda rows: t[rows], mixture({"ce": 1.0}), frozen=frozen
        )
        found[columns] = torch.autograd.grad(result.per_depth.sum(), (states, weight))
    assert (found[10][0] - found[0][0]).abs().max() < TOLERANCE
    assert (found[10][1] - found[0][1][:, 10:]).abs().max() < TOLERANCE


def test_losses_place_by_place_can_be_weighted_by_themselves():
    """Weights may follow from the losses (D-PACE): the states' gradient equals that over all logits at once."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(20, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    t = torch.randn(20, 40, generator=generator, dtype=torch.float64)
    wanted = plain("ce", states @ head.T, t)
    (wanted_grad,) = torch.autograd.grad((wanted * wanted.detach().exp()).sum(), states)
    values, right = place_loss(states, head, lambda rows: t[rows], mixture({"ce": 1.0}))
    (grad,) = torch.autograd.grad((values * values.detach().exp()).sum(), states)
    assert (values - wanted).abs().max() < TOLERANCE
    assert (grad - wanted_grad).abs().max() < TOLERANCE * wanted_grad.abs().max()
    assert torch.equal(right, (states @ head.T).argmax(-1) == t.argmax(-1))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("columns", [0, 10])
def test_weights_may_follow_from_the_drafts(trained, columns):
    """Loss and gradients are those of the same weights given beforehand, with frozen heads and trained ones."""
    generator = torch.Generator().manual_seed(6)
    states, head, t, by_place = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 20, 16), (40, 16), (20, 40), (2, 20))
    )
    states.requires_grad_()
    weight, frozen = head[:, columns:].clone().requires_grad_(trained), head[:, :columns] if columns else None
    sought = (states, weight) if trained else (states,)
    found = {}

    def weigh(right, measured):
        return by_place * right + measured

    for known in (True, False):
        z = states.detach() @ head.T
        alpha = torch.minimum(z.softmax(-1), t.softmax(-1)).sum(-1)
        weights = weigh(z.argmax(-1) == t.argmax(-1), alpha) if known else weigh
        result = head_loss(
            states, weight, weights, lambda rows: t[rows], mixture({"jsd": 1.0}), frozen=frozen, measure=acceptance
        )
        total = 2.5 * result.per_depth.sum()
        found[known] = [total.detach(), result.weights, result.measured, *torch.autograd.grad(total, sought)]
    assert (found[True][2] - alpha).abs().max() < TOLERANCE
    for mine, theirs in zip(found[False], found[True], strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE


def test_a_trained_head_cannot_be_weighted_after_the_fact():
    """A trained head is refused: its gradient would be formed before the weights are known."""
    head = torch.randn(10, 8, requires_grad=True)
    with pytest.raises(AssertionError, match="frozen"):
        place_loss(torch.randn(4, 8), head, lambda rows: torch.randn(4, 10)[rows], mixture({"ce": 1.0}))
