"""The losses of drafting, each with its closed-form gradient with respect to the draft logits.

p is the verifier's and q the draft's distribution of a place, both over the draft vocabulary, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from speculators.registry import Registry

NLA_FLOOR = 1e-5
LK_SHARPNESS = 3.0


class Target:
    """The verifier's distributions of C places, made once and used by every depth.

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
        """[C] sum_v p log p, from the logits so that no p log p of an underflown p is formed."""
        top = self._logits.amax(-1)
        log_norm = top - self.p.amax(-1).log()
        return torch.linalg.vecdot(self.p, self._logits) - log_norm

    @cached_property
    def top(self) -> torch.Tensor:
        """[C] the draft id that the verifier finds most likely."""
        return self.p.argmax(-1)

    def likeliest(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """p and draft ids, [C, k] each, of the verifier's k most likely tokens."""
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
        # q of the largest logit is at least 1/D, so its logarithm is safe, and one exponential pass is saved.
        self._largest = logits.amax(-1)
        self.log_norm = self._largest - self.q.amax(-1).log()

    @cached_property
    def log_q(self) -> torch.Tensor:
        """[C, D] log q."""
        return self.logits - self.log_norm[:, None]

    def is_right(self, target: Target) -> torch.Tensor:
        """[C] bool: the draft's most likely token is the verifier's."""
        return self.logits.gather(-1, target.top[:, None])[:, 0] >= self._largest


Loss = Callable[[Draft, Target], tuple[torch.Tensor, torch.Tensor]]
LOSSES: Registry[Loss] = Registry("loss")


def _register(name: str) -> Callable[[Loss], Loss]:
    return lambda loss: LOSSES.add(name, loss)


def acceptance(draft: Draft, target: Target) -> torch.Tensor:
    """[C] alpha = sum_v min(p, q): the chance that a sampled draft is accepted (Leviathan et al. 2211.17192)."""
    return torch.minimum(draft.q, target.p).sum(-1)


@_register("kl_div")
def kl_div(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p, q); gradient q - p."""
    cross = draft.log_norm - torch.linalg.vecdot(target.p, draft.logits)
    return target.negative_entropy + cross, draft.q - target.p


@_register("rkl")
def rkl(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q, p); gradient q (log q - log p - L)."""
    ratio = draft.log_q - target.log_p
    value = torch.linalg.vecdot(draft.q, ratio)
    return value, draft.q * (ratio - value[:, None])


@_register("jsd")
def jsd(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon divergence (Lin 1991); gradient half q (log(q / mu) - KL(q, mu))."""
    # logaddexp instead of log((p + q) / 2): p or q may be 0 in float32 where its logarithm is finite.
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
    """Total variation 1 - alpha; gradient -q (1[q <= p] - sum over q <= p of q)."""
    below = (draft.q <= target.p).to(draft.q.dtype)
    mass = torch.linalg.vecdot(draft.q, below)
    return 1.0 - acceptance(draft, target), draft.q * (mass[:, None] - below)


@_register("nla")
def nla(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """-log max(alpha, 1e-5), the negative log acceptance (Samarin et al. 2602.23881)."""
    distance, grad = tv(draft, target)
    alpha = 1.0 - distance
    live = (alpha > NLA_FLOOR).to(alpha.dtype)
    alpha = alpha.clamp_min(NLA_FLOOR)
    return -alpha.log(), grad * (live / alpha)[:, None]


@_register("lk_hybrid")
def lk_hybrid(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """lambda KL + (1 - lambda) TV, lambda = exp(-3 alpha) without gradient (Samarin et al. 2602.23881)."""
    divergence, grad_kl = kl_div(draft, target)
    distance, grad_tv = tv(draft, target)
    share = torch.exp(-LK_SHARPNESS * (1.0 - distance))
    value = share * divergence + (1.0 - share) * distance
    return value, share[:, None] * grad_kl + (1.0 - share)[:, None] * grad_tv


def top_k(k: int) -> Loss:
    """Returns the cross-entropy -sum p log q over the verifier's k most likely tokens (HASS, Zhang et al. 2408.15766,
    section 3.1); its gradient is q times their sum of p, less p of each. All tokens where k exceeds them."""

    def loss(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        p, ids = target.likeliest(min(k, target.p.shape[-1]))
        value = torch.linalg.vecdot(p, draft.log_norm[:, None] - draft.logits.gather(-1, ids))
        return value, (draft.q * p.sum(-1, keepdim=True)).scatter_add(-1, ids, -p)

    return loss


def mixture(weights: dict[str, float]) -> Loss:
    """Returns the weighted sum of losses.

    Raises:
        RegistryError: a loss that does not exist, with the ones that do.
    """
    return weighted([(LOSSES.get(name), weight) for name, weight in weights.items()])


def weighted(parts: Sequence[tuple[Loss, float]]) -> Loss:
    """Returns the sum of losses, each times its weight."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]

    def summed(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        results = [(loss(draft, target), weight) for loss, weight in parts]
        value = sum((result[0] * weight for result, weight in results), torch.zeros(()))
        grad = sum((result[1] * weight for result, weight in results), torch.zeros(()))
        return value, grad

    return summed
