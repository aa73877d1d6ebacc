"""Judges drafts, as pure functions of logits, draft and generator that keep the verifier's distribution exactly."""

from __future__ import annotations

import attrs
import torch

from speculators.drafter import Proposal
from speculators.errors import VerifierError
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.token_filter import filtered


@attrs.frozen
class Verification:
    """The outcome of one round.

    Attributes:
        path: indices in the proposal of the accepted nodes, from the root down.
        token: the verifier's own token that follows them.
    """

    path: tuple[int, ...]
    token: int


def verify(
    logits: torch.Tensor,
    proposal: Proposal | None,
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    block_verification: bool = False,
    generator: torch.Generator | None,
) -> Verification:
    """Judges a proposal at the given temperature.

    Args:
        logits: [N + 1, V]: row 0 follows the last verified token, row i + 1 follows node i.
        proposal: None, if nothing was drafted, only yields the verifier's own token.
        token_filter: tokens that the verifier samples from; not used at T = 0.
        block_verification: judges a chain as a whole instead of token by token; at T = 0 that is the same.
        generator: source of all randomness, on the device of `logits`; not used at T = 0.

    Raises:
        VerifierError: a tree cannot be judged as a block.
    """
    if temperature == 0:
        return verify_greedy(logits, proposal)
    if block_verification and proposal is not None:
        return verify_block(logits, proposal, temperature=temperature, token_filter=token_filter, generator=generator)
    return verify_sampling(logits, proposal, temperature=temperature, token_filter=token_filter, generator=generator)


def verify_greedy(logits: torch.Tensor, proposal: Proposal | None) -> Verification:
    """Accepts the path on which every node is the verifier's argmax.

    Args:
        logits: [N + 1, V] as in `verify`.
    """
    best = logits.argmax(dim=-1).tolist()
    children = _children(proposal)
    tokens = [] if proposal is None else proposal.tokens.tolist()
    path: list[int] = []
    node = -1
    while True:
        token = best[node + 1]
        node = next((child for child in children.get(node, ()) if tokens[child] == token), -1)
        if node < 0:
            return Verification(tuple(path), token)
        path.append(node)


def verify_sampling(
    logits: torch.Tensor,
    proposal: Proposal | None,
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    generator: torch.Generator | None,
) -> Verification:
    """Accepts nodes by exact rejection sampling, so that every emitted token has the verifier's distribution.

    A node drawn from q is accepted with probability min(1, p/q). After a rejection p becomes norm(max(p - q, 0)), and
    the next sibling is tried against that. Siblings may be drawn without replacement: each node's q is then the one it
    was drawn from, without its earlier siblings, and the rule is exact for any such q. A node without q was chosen, not
    drawn. Its q is a point mass: it is accepted with probability p(x), and the residual is p without x. The rule is
    exact for any q, so the verifier's distribution may be filtered and the draft's whole.

    Args:
        logits: [N + 1, V] as in `verify`.
        temperature: > 0.
        token_filter: tokens that the verifier samples from.

    Source: Leviathan et al. 2211.17192, appendix A; several candidates: Miao et al. 2305.09781, algorithm 2.
    """
    children = _children(proposal)
    path: list[int] = []
    node = -1
    while True:
        # The verifier's distribution after this node.
        p = torch.softmax(filtered(logits[node + 1].float() / temperature, token_filter), dim=-1)
        accepted = -1
        for child in children.get(node, ()):
            assert proposal is not None
            token = int(proposal.tokens[child])
            q = None if proposal.probs is None else proposal.probs[child]
            drafted = 1.0 if q is None else float(q[token])
            if is_accepted(float(p[token]), drafted, generator):
                accepted = child
                break
            # The next sibling is judged by what the verifier still has to give.
            p = residual(p, q, token)
        # No child was accepted: the verifier's own token comes from the last residual.
        if accepted < 0:
            return Verification(tuple(path), draw(p, generator))
        path.append(accepted)
        node = accepted


def verify_block(
    logits: torch.Tensor,
    proposal: Proposal,
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    generator: torch.Generator | None,
) -> Verification:
    """Accepts a prefix of a chain x_1..x_K by its joint probability: exact, and in expectation no shorter.

    With r_0 = 1, r_i = min(1, r_{i-1} p_i(x_i) / q_i(x_i)) and S_i = sum_x max(r_i p_{i+1}(x) - q_{i+1}(x), 0), the
    prefix of length i passes with probability S_i / (S_i + 1 - r_i), the whole chain with r_K. The longest that passes
    is accepted. The verifier's own token then comes from norm(max(r_i p_{i+1} - q_{i+1}, 0)), behind the whole chain
    from p. As in `verify_sampling`, q may be any distribution, and is a point mass for drafts that were chosen.

    Args:
        logits: [K + 1, V] as in `verify`.
        temperature: > 0.
        token_filter: tokens that the verifier samples from.

    Raises:
        VerifierError: the proposal is a tree.

    Source: Sun et al. 2403.10444, section 3.
    """
    size = len(proposal.tokens)
    if proposal.parents.tolist() != list(range(-1, size - 1)):
        raise VerifierError("a drafted tree cannot be verified as a block", hint='benchmark.verification = "token"')
    p = torch.softmax(filtered(logits.float() / temperature, token_filter), dim=-1)  # [K + 1, V]
    drafts = proposal.tokens.to(p.device)[:, None]  # [K, 1]
    q = torch.zeros_like(p[:-1]).scatter(-1, drafts, 1.0) if proposal.probs is None else proposal.probs  # [K, V]
    ratios = p[:-1].gather(-1, drafts).double() / q.gather(-1, drafts)  # [K, 1]
    r = [1.0]
    for ratio in ratios[:, 0].tolist():
        r.append(min(1.0, r[-1] * ratio))
    s = (torch.tensor(r[:-1], device=p.device)[:, None] * p[:-1] - q).clamp_min(0.0).sum(dim=-1).tolist()
    # Numerator and denominator of the probability that the prefix of each length passes.
    odds = [*((s[i], s[i] + 1.0 - r[i]) for i in range(size)), (r[size], 1.0)]
    accepted = next((i for i in range(size, 0, -1) if is_accepted(*odds[i], generator)), 0)
    own = p[size] if accepted == size else residual(r[accepted] * p[accepted], q[accepted], int(drafts[accepted]))
    return Verification(tuple(range(accepted)), draw(own, generator))


def is_accepted(p: float, q: float, generator: torch.Generator | None) -> bool:
    """Draws True with probability min(1, p / q)."""
    device = None if generator is None else generator.device
    # u < min(1, p / q), without the division.
    return float(torch.rand((), generator=generator, device=device)) * q < p


def draw(p: torch.Tensor, generator: torch.Generator | None) -> int:
    """Draws a token from the distribution p, [V]."""
    return int(torch.multinomial(p, 1, generator=generator))


def residual(p: torch.Tensor, q: torch.Tensor | None, token: int) -> torch.Tensor:
    """Computes the distribution to draw from after `token`, drawn from q, was rejected: norm(max(p - q, 0)).

    Args:
        p: [V], the distribution that the draft was judged by.
        q: [V], the distribution that it was drawn from; None for a point mass on `token`.
    """
    if q is None:
        rest = p.clone()
        rest[token] = 0.0
    else:
        rest = (p - q).clamp_min(0.0)
    total = rest.sum()
    # If p = q up to rounding, a rejection has probability zero, but its residual must still be a distribution.
    return rest / total if float(total) > 0 else p


def _children(proposal: Proposal | None) -> dict[int, list[int]]:
    """Lists each node's children in the order in which they were drafted; -1 is the root."""
    children: dict[int, list[int]] = {}
    for child, parent in enumerate([] if proposal is None else proposal.parents.tolist()):
        children.setdefault(parent, []).append(child)
    return children
