"""Verification keeps the verifier's distribution exactly, and the tests detect it if it does not."""

from __future__ import annotations

import itertools

import pytest
import torch
from toys import fit_p_value

from speculators.decoding import verify as module
from speculators.decoding.verify import Verification, residual, verify, verify_greedy, verify_sampling
from speculators.drafter import Proposal, chain
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.token_filter import filtered

VOCAB = 8
DRAWS = 4000


def test_greedy_accepts_the_drafts_that_are_the_argmax_and_adds_the_verifiers_own_token():
    """A chain is accepted up to the first draft that is not the verifier's argmax; that argmax is emitted instead."""
    logits = torch.eye(VOCAB)[[3, 5, 1, 2]]
    assert verify_greedy(logits, chain(torch.tensor([3, 5, 7]))) == Verification((0, 1), 1)
    assert verify_greedy(logits, chain(torch.tensor([3, 5, 1]))) == Verification((0, 1, 2), 2)
    assert verify_greedy(logits, chain(torch.tensor([0, 5, 1]))) == Verification((), 3)


def test_greedy_walks_down_the_branch_of_a_tree_that_the_verifier_takes():
    """Among siblings the one that is the argmax is followed, in any order."""
    tree = Proposal(tokens=torch.tensor([4, 3, 6, 5]), parents=torch.tensor([-1, -1, 0, 1]))
    logits = torch.eye(VOCAB)[[3, 6, 5, 0, 2]]
    assert verify_greedy(logits, tree) == Verification((1, 3), 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_drafts_the_verifiers_own_token_is_all_there_is(temperature):
    """None and an empty proposal both make a round of plain decoding."""
    logits = torch.tensor([[0.0, 200.0, 0.0]])
    for proposal in (None, chain(torch.empty(0, dtype=torch.int64))):
        generator = torch.Generator().manual_seed(0)
        assert verify(logits, proposal, temperature=temperature, generator=generator) == Verification((), 1)


def test_the_residual_is_the_part_of_p_that_q_did_not_cover():
    """The residual is norm(max(p - q, 0)) for a drawn draft, and p without the token for a chosen one."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.8, 0.1])
    torch.testing.assert_close(residual(p, q, 1), torch.tensor([0.8, 0.0, 0.2]))
    torch.testing.assert_close(residual(p, None, 1), torch.tensor([5 / 7, 0.0, 2 / 7]))
    torch.testing.assert_close(residual(p, p, 1), p)


def _softmax_rows(seed: int, rows: int) -> torch.Tensor:
    return torch.softmax(2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _draw_siblings(q: torch.Tensor, number: int, generator: torch.Generator) -> tuple[list[int], list[torch.Tensor]]:
    """Draws without replacement; each node's probabilities are what it was drawn from."""
    tokens, probs = [], []
    for _ in range(number):
        token = int(torch.multinomial(q, 1, generator=generator))
        tokens.append(token)
        probs.append(q)
        q = q.clone().index_fill_(0, torch.tensor(token), 0.0)
        q = q / q.sum()
    return tokens, probs


def _chain_proposal(generator: torch.Generator) -> Proposal:
    """Two tokens, the second drawn from a distribution that depends on the first."""
    table = _softmax_rows(1, VOCAB + 1)
    first = int(torch.multinomial(table[VOCAB], 1, generator=generator))
    second = int(torch.multinomial(table[first], 1, generator=generator))
    return chain(torch.tensor([first, second]), torch.stack([table[VOCAB], table[first]]))


def _tree_proposal(generator: torch.Generator) -> Proposal:
    """Three siblings without replacement, two children of each of the first two."""
    table = _softmax_rows(1, VOCAB + 1)
    tokens, probs = _draw_siblings(table[VOCAB], 3, generator)
    parents = [-1, -1, -1]
    for node in (0, 1):
        more, their_probs = _draw_siblings(table[tokens[node]], 2, generator)
        tokens, probs, parents = tokens + more, probs + their_probs, [*parents, node, node]
    return Proposal(torch.tensor(tokens), torch.tensor(parents), torch.stack(probs))


def _chosen_proposal(generator: torch.Generator) -> Proposal:
    """Deterministic drafts, with a choice at the root and one below: no probabilities."""
    return Proposal(torch.tensor([2, 5, 6]), torch.tensor([-1, -1, 0]))


def _p_value(propose, temperature: float = 0.7, token_filter: TokenFilter = ALL_TOKENS) -> float:
    """Tests the first two emitted tokens against the verifier's exact distribution by chi-square, seeded."""
    generator = torch.Generator().manual_seed(7)
    logits = 1.5 * torch.randn(VOCAB + 1, VOCAB, generator=generator)  # row t follows token t, the last one the root
    p = torch.softmax(filtered(logits / temperature, token_filter), dim=-1)
    seen = torch.zeros(VOCAB, VOCAB)
    for _ in range(DRAWS):
        proposal = propose(generator)
        rows = torch.cat([logits[VOCAB:], logits[proposal.tokens]])
        verdict = verify_sampling(
            rows, proposal, temperature=temperature, token_filter=token_filter, generator=generator
        )
        emitted = [*proposal.tokens[list(verdict.path)].tolist(), verdict.token]
        if len(emitted) == 1:
            emitted.append(int(torch.multinomial(p[emitted[0]], 1, generator=generator)))
        seen[emitted[0], emitted[1]] += 1
    assert not seen[p[VOCAB, :, None] * p[:VOCAB] == 0].any()
    return fit_p_value(seen, p[VOCAB, :, None] * p[:VOCAB])


@pytest.mark.parametrize("propose", [_chain_proposal, _tree_proposal, _chosen_proposal])
def test_sampling_emits_tokens_with_the_verifiers_exact_distribution(propose):
    """Pairs of emitted tokens fit softmax(logits / T) for chains, trees without replacement and chosen drafts."""
    assert _p_value(propose) > 0.01


@pytest.mark.parametrize("propose", [_chain_proposal, _tree_proposal, _chosen_proposal])
@pytest.mark.parametrize(
    "token_filter", [TokenFilter(top_p=0.7), TokenFilter(top_k=3), TokenFilter(top_p=0.9, top_k=5, min_p=0.05)], ids=str
)
def test_sampling_emits_the_filtered_distribution_whatever_is_drafted(propose, token_filter):
    """Drafts come from a whole q: pairs fit the verifier's renormalised distribution, and no other token is emitted."""
    assert _p_value(propose, token_filter=token_filter) > 0.01


@pytest.mark.parametrize("propose", [_chain_proposal, _tree_proposal, _chosen_proposal])
def test_a_rule_without_the_residual_fails_the_same_test(propose, monkeypatch):
    """The test above detects a common mistake: drawing from p instead of the residual after a rejection."""
    monkeypatch.setattr(module, "residual", lambda p, q, token: p)
    assert _p_value(propose) < 1e-6


def test_acceptance_of_a_drawn_token_is_the_overlap_of_the_two_distributions():
    """One draft is accepted with probability sum min(p, q); the tolerance is four standard errors."""
    logits = torch.log(_softmax_rows(3, 1))
    p, q = torch.exp(logits[0]), _softmax_rows(4, 1)[0]
    generator = torch.Generator().manual_seed(5)
    accepted = 0
    for _ in range(DRAWS):
        draft = torch.multinomial(q, 1, generator=generator)
        rows = torch.cat([logits, logits])
        accepted += len(verify_sampling(rows, chain(draft, q[None]), temperature=1.0, generator=generator).path)
    overlap = float(torch.minimum(p, q).sum())
    assert accepted / DRAWS == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / DRAWS) ** 0.5)


def test_a_seed_decides_everything():
    """The same generator state gives the same verdict."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    verdicts = [
        verify_sampling(
            logits,
            _chain_proposal(torch.Generator().manual_seed(seed)),
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for _, seed in itertools.product(range(2), range(20))
    ]
    assert verdicts[:20] == verdicts[20:]
