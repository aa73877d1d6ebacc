"""The losses of drafting, each with its closed-form gradient with respect to the draft logits.

p is the verifier's and q the draft's distribution of a place, both over the draft vocabulary, in float32. A loss takes
a `Draft` and a `Target` of C places and returns its values [C] and its gradients [C, D]. The gradients are known in
closed form, so no autograd graph over [C, D] is ever built; for any loss L(q) they follow from dL/dz = q (g - sum_v q
g) with g = dL/dq.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from speculators.registry import Registry

# Smallest acceptance that `nla` takes the logarithm of.
NLA_FLOOR = 1e-5
# How fast `lk_hybrid` turns from KL to TV as acceptance grows: lambda = exp(-3 alpha).
LK_SHARPNESS = 3.0


class Target:
    """The verifier's distributions of C places, computed once for all depths.

    Args:
        logits: [C, D] float32 (or float64).
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.p = torch.softmax(logits, -1)
        self._logits = logits
        self._likeliest: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def log_p(self) -> torch.Tensor:
        """[C, D] log p."""
        return torch.log_softmax(self._logits, -1)

    @cached_property
    def negative_entropy(self) -> torch.Tensor:
        """[C] sum_v p log p."""
        # From the logits, as sum p z - log Z: where p underflows to 0, p log p would be 0 * -inf.
        top = self._logits.amax(-1)
        log_norm = top - self.p.amax(-1).log()
        return torch.linalg.vecdot(self.p, self._logits) - log_norm

    @cached_property
    def top(self) -> torch.Tensor:
        """[C] int64, the draft id that the verifier finds most likely."""
        return self.p.argmax(-1)

    def likeliest(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Picks the verifier's k most likely tokens: p and draft ids, [C, k] each."""
        if k not in self._likeliest:
            self._likeliest[k] = self.p.topk(k, -1)
        return self._likeliest[k]


class Draft:
    """The draft's distributions of the same C places at one depth.

    Args:
        logits: [C, D] float32 (or float64).
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.q = torch.softmax(logits, -1)
        # log Z = z_max - log q_max. q of the largest logit is at least 1/D, so its logarithm is safe, and this saves
        # the second pass of exponentials that logsumexp would take.
        self._largest = logits.amax(-1)
        self.log_norm = self._largest - self.q.amax(-1).log()

    @cached_property
    def log_q(self) -> torch.Tensor:
        """[C, D] log q."""
        return self.logits - self.log_norm[:, None]

    def is_right(self, target: Target) -> torch.Tensor:
        """[C] bool, whether the draft's most likely token is the verifier's."""
        # By value instead of argmax: a gather of one column is cheaper than a second search through D.
        return self.logits.gather(-1, target.top[:, None])[:, 0] >= self._largest


Loss = Callable[[Draft, Target], tuple[torch.Tensor, torch.Tensor]]
LOSSES: Registry[Loss] = Registry("loss")


def _register(name: str) -> Callable[[Loss], Loss]:
    return lambda loss: LOSSES.add(name, loss)


def acceptance(draft: Draft, target: Target) -> torch.Tensor:
    """[C] alpha = sum_v min(p, q), the chance that a sampled draft is accepted (Leviathan et al. 2211.17192)."""
    return torch.minimum(draft.q, target.p).sum(-1)


@_register("kl_div")
def kl_div(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p, q) = sum_v p (log p - log q); gradient q - p."""
    cross = draft.log_norm - torch.linalg.vecdot(target.p, draft.logits)
    return target.negative_entropy + cross, draft.q - target.p


@_register("rkl")
def rkl(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q, p) = sum_v q (log q - log p); gradient q (log q - log p - L)."""
    # Both in logarithms: the ratio of two underflown probabilities stays finite.
    ratio = draft.log_q - target.log_p
    value = torch.linalg.vecdot(draft.q, ratio)
    return value, draft.q * (ratio - value[:, None])


@_register("jsd")
def jsd(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon divergence (Lin 1991): half KL(p, mu) + half KL(q, mu), mu = (p + q) / 2.

    The gradient is half q (log(q / mu) - KL(q, mu)).
    """
    # logaddexp instead of log((p + q) / 2): p and q may be 0 in float32 where their logarithms are finite.
    log_mu = torch.logaddexp(draft.log_q, target.log_p) - torch.log(torch.tensor(2.0, dtype=draft.q.dtype))
    ratio = draft.log_q - log_mu
    from_q = torch.linalg.vecdot(draft.q, ratio)
    from_p = torch.linalg.vecdot(target.p, target.log_p - log_mu)
    return 0.5 * (from_p + from_q), 0.5 * draft.q * (ratio - from_q[:, None])


@_register("ce")
def ce(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """-log q of the verifier's most likely token; gradient q - onehot."""
    top = target.top[:, None]
    value = draft.log_norm - draft.logits.gather(-1, top)[:, 0]
    return value, draft.q.scatter_add(-1, top, torch.full_like(top, -1, dtype=draft.q.dtype))


@_register("tv")
def tv(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Total variation distance, 1 - alpha; gradient -q (1[q <= p] - sum over q <= p of q).

    alpha grows with q only where q <= p: there min(p, q) = q.
    """
    below = (draft.q <= target.p).to(draft.q.dtype)
    mass = torch.linalg.vecdot(draft.q, below)
    return 1.0 - acceptance(draft, target), draft.q * (mass[:, None] - below)


@_register("nla")
def nla(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log acceptance, -log max(alpha, 1e-5) (Samarin et al. 2602.23881)."""
    distance, grad = tv(draft, target)
    alpha = 1.0 - distance
    # Below the floor the loss is constant, and its gradient 0.
    live = (alpha > NLA_FLOOR).to(alpha.dtype)
    alpha = alpha.clamp_min(NLA_FLOOR)
    return -alpha.log(), grad * (live / alpha)[:, None]


@_register("lk_hybrid")
def lk_hybrid(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """lambda KL + (1 - lambda) TV, lambda = exp(-3 alpha) without gradient (Samarin et al. 2602.23881)."""
    divergence, grad_kl = kl_div(draft, target)
    distance, grad_tv = tv(draft, target)
    # lambda is treated as a constant, as in the paper.
    share = torch.exp(-LK_SHARPNESS * (1.0 - distance))
    value = share * divergence + (1.0 - share) * distance
    return value, share[:, None] * grad_kl + (1.0 - share)[:, None] * grad_tv


def top_k(k: int) -> Loss:
    """Makes the top-k distillation of HASS (Zhang et al. 2408.15766, section 3.1): -sum p log q over k tokens.

    The tokens are the verifier's k most likely, or all if there are fewer. The gradient is q sum_k p - p, with p = 0
    for all other tokens.
    """

    def loss(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        p, ids = target.likeliest(min(k, target.p.shape[-1]))
        value = torch.linalg.vecdot(p, draft.log_norm[:, None] - draft.logits.gather(-1, ids))
        return value, (draft.q * p.sum(-1, keepdim=True)).scatter_add(-1, ids, -p)

    return loss


def mixture(weights: dict[str, float]) -> Loss:
    """Makes the weighted sum of losses by name.

    Raises:
        RegistryError: a loss does not exist; lists those that do.
    """
    return weighted([(LOSSES.get(name), weight) for name, weight in weights.items()])


def weighted(parts: Sequence[tuple[Loss, float]]) -> Loss:
    """Makes the sum of losses, each times its weight."""
    # The plain loss stays as it is: a product with 1.0 would cost a pass over [C, D].
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]

    def summed(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        results = [(loss(draft, target), weight) for loss, weight in parts]
        value = sum((result[0] * weight for result, weight in results), torch.zeros(()))
        grad = sum((result[1] * weight for result, weight in results), torch.zeros(()))
        return value, grad

    return summed
