"""Verification keeps the verifier's distribution exactly, and the tests detect it if it does not.

Every random choice of a round, those of the drafter included, is followed to each of its outcomes, so the distribution
of what it emits is computed and not sampled. It may differ from the verifier's by float32 rounding alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import attrs
import pytest
import torch
from chances import Chances, every_outcome, total_variation
from scipy.stats import chi2, ncx2
from toys import fit_p_value

from speculators.decoding import verify as module
from speculators.decoding.verify import Verification, residual, verify, verify_greedy
from speculators.drafter import Proposal, chain
from speculators.errors import VerifierError
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.token_filter import filtered

VOCAB = 8
TEMPERATURE = 0.7
# Total variation by rounding: float32 gives 1e-7. The wrong rules are off by more than ten thousand times that.
ROUNDING = 1e-6
DETECTED = 0.005


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


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_drafts_the_verifiers_own_token_is_all_there_is(temperature, block):
    """None and an empty proposal both make a round of plain decoding."""
    logits = torch.tensor([[0.0, 200.0, 0.0]])
    for proposal in (None, chain(torch.empty(0, dtype=torch.int64))):
        options = {"block_verification": block, "generator": torch.Generator().manual_seed(0)}
        assert verify(logits, proposal, temperature=temperature, **options) == Verification((), 1)


def test_the_residual_is_the_part_of_p_that_q_did_not_cover():
    """The residual is norm(max(p - q, 0)) for a drawn draft, and p without the token for a chosen one."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.8, 0.1])
    torch.testing.assert_close(residual(p, q, 1), torch.tensor([0.8, 0.0, 0.2]))
    torch.testing.assert_close(residual(p, None, 1), torch.tensor([5 / 7, 0.0, 2 / 7]))
    torch.testing.assert_close(residual(p, p, 1), p)


def test_a_tree_cannot_be_verified_as_a_block_and_greedy_decoding_does_not_care():
    """The rule is one for chains; at T = 0 both accept the path that is the argmax."""
    tree = Proposal(tokens=torch.tensor([4, 3]), parents=torch.tensor([-1, -1]))
    logits = torch.eye(VOCAB)[[3, 6, 5]]
    with pytest.raises(VerifierError, match="a drafted tree cannot be verified as a block"):
        verify(logits, tree, temperature=1.0, block_verification=True, generator=None)
    for block in (False, True):
        assert verify(logits, tree, temperature=0.0, block_verification=block, generator=None).path == (1,)


@attrs.frozen(eq=False)
class World:
    """A verifier and a drafter with `size` tokens, whose distributions follow from the token before.

    Attributes:
        logits: [size + 1, size] of the verifier; row t follows token t, the last one the root.
        q: [size + 1, size] of the drafter, likewise.
        token_filter: tokens that the verifier samples from.
    """

    logits: torch.Tensor
    q: torch.Tensor
    token_filter: TokenFilter

    @classmethod
    def of(cls, size: int, token_filter: TokenFilter = ALL_TOKENS) -> World:
        logits, other = torch.randn(2, size + 1, size, generator=torch.Generator().manual_seed(1))
        # Drafter and verifier are related: drafts are accepted about as often as rejected.
        return cls(0.7 * logits, torch.softmax(0.7 * logits + 1.5 * other, dim=-1), token_filter)

    @property
    def p(self) -> torch.Tensor:
        return torch.softmax(filtered(self.logits / TEMPERATURE, self.token_filter), dim=-1).double()

    def continued(self, joint: torch.Tensor, length: int) -> torch.Tensor:
        """Extends a distribution over sequences, [size] * n, to `length` tokens by the verifier's own."""
        while joint.ndim < length:
            joint = joint[..., None] * self.p[:-1]
        return joint


Propose = Callable[[World, Chances], Proposal]


def drawn_chain(world: World, chances: Chances, *, length: int = 2) -> Proposal:
    """A chain in which each token is drawn after the one before."""
    tokens, before = [], -1
    rows = []
    for _ in range(length):
        rows.append(world.q[before])
        before = chances.pick(world.q[before].tolist())
        tokens.append(before)
    return chain(torch.tensor(tokens), torch.stack(rows))


def chosen_chain(world: World, chances: Chances) -> Proposal:
    """Three tokens that were chosen: no probabilities."""
    return chain(world.q[-1].topk(3).indices)


def siblings(world: World, chances: Chances, before: int, number: int) -> tuple[list[int], list[torch.Tensor]]:
    """Draws without replacement; each node's probabilities are what it was drawn from."""
    q, tokens, probs = world.q[before], [], []
    for _ in range(number):
        tokens.append(chances.pick(q.tolist()))
        probs.append(q)
        q = q.index_fill(0, torch.tensor(tokens), 0.0)
        q = q / q.sum()
    return tokens, probs


def drawn_siblings(world: World, chances: Chances, *, number: int = 2) -> Proposal:
    """Siblings without replacement and nothing below them."""
    tokens, probs = siblings(world, chances, -1, number)
    return Proposal(torch.tensor(tokens), torch.full((number,), -1), torch.stack(probs))


def drawn_tree(world: World, chances: Chances) -> Proposal:
    """Two siblings without replacement, and two children of the second one."""
    tokens, probs = siblings(world, chances, -1, 2)
    more, their_probs = siblings(world, chances, tokens[1], 2)
    return Proposal(torch.tensor(tokens + more), torch.tensor([-1, -1, 1, 1]), torch.stack(probs + their_probs))


def chosen_tree(world: World, chances: Chances) -> Proposal:
    """The drafter's three most probable tokens, and two of what follows the first: no probabilities."""
    first = world.q[-1].topk(3).indices
    return Proposal(torch.cat([first, world.q[first[0]].topk(2).indices]), torch.tensor([-1, -1, -1, 0, 0]))


def emitted(world: World, propose: Propose, *, block: bool = False) -> dict[int, torch.Tensor]:
    """Follows a round to all its outcomes.

    Returns:
        For each number of emitted tokens, the probability that a round emits so many and that they and the verifier's
        own behind them are these: [size] * (most tokens that a round emits).
    """

    def emit(chances: Chances) -> tuple[int, ...]:
        proposal = propose(world, chances)
        rows = torch.cat([world.logits[-1:], world.logits[proposal.tokens]])
        options = {"temperature": TEMPERATURE, "token_filter": world.token_filter, "block_verification": block}
        verdict = verify(rows, proposal, generator=chances, **options)
        return *proposal.tokens[list(verdict.path)].tolist(), verdict.token

    seen: dict[int, torch.Tensor] = {}
    for tokens, weight in every_outcome(emit):
        empty = torch.zeros([world.logits.shape[1]] * len(tokens), dtype=torch.float64)
        seen.setdefault(len(tokens), empty)[tokens] += weight
    return {length: world.continued(joint, max(seen)) for length, joint in seen.items()}


def deviation(world: World, propose: Propose, *, block: bool = False) -> float:
    """Computes the total variation between what a round emits and the verifier's own tokens."""
    found = sum(emitted(world, propose, block=block).values())
    return total_variation(found, world.continued(world.p[-1], found.ndim))


SHAPES = {
    "chain": (8, drawn_chain, False),
    "long chain": (4, partial(drawn_chain, length=3), False),
    "chosen chain": (8, chosen_chain, False),
    "block": (8, drawn_chain, True),
    "long block": (4, partial(drawn_chain, length=3), True),
    "chosen block": (8, chosen_chain, True),
    "siblings": (8, drawn_siblings, False),
    "three siblings": (4, partial(drawn_siblings, number=3), False),
    "tree": (4, drawn_tree, False),
    "chosen tree": (8, chosen_tree, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_round_emits_tokens_with_the_verifiers_exact_distribution(shape):
    """By either rule for chains, for trees without replacement, and for drafts that were chosen."""
    size, propose, block = SHAPES[shape]
    assert deviation(World.of(size), propose, block=block) < ROUNDING


FILTERS = [TokenFilter(top_p=0.7), TokenFilter(top_k=3), TokenFilter(top_p=0.9, top_k=5, min_p=0.05)]


@pytest.mark.parametrize("shape", ["chain", "block", "chosen block", "siblings", "chosen tree"])
@pytest.mark.parametrize("token_filter", FILTERS, ids=str)
def test_a_round_emits_the_filtered_distribution_whatever_is_drafted(shape, token_filter):
    """Drafts come from a whole q: what is emitted has the renormalised distribution of the kept tokens."""
    size, propose, block = SHAPES[shape]
    assert deviation(World.of(size, token_filter), propose, block=block) < ROUNDING


def _not_subtracted(p, q, token):
    return p


def _not_normalised(p, q, token):
    rest = p.index_fill(0, torch.tensor(token), 0.0) if q is None else (p - q).clamp_min(0.0)
    return rest if float(rest.sum()) > 0 else p


def _of_one_token(p, q, token):
    """The residual of token verification: what the earlier drafts have left of p is forgotten."""
    return residual(p / p.sum(), q, token)


def _of_a_chosen_draft(p, q, token):
    return residual(p, None, token)


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ("chain", _not_subtracted),
        ("block", _not_subtracted),
        ("siblings", _not_subtracted),
        ("chosen tree", _not_subtracted),
        ("siblings", _not_normalised),
        ("tree", _not_normalised),
        ("chosen tree", _not_normalised),
        ("block", _of_one_token),
        ("long block", _of_one_token),
        ("chain", _of_a_chosen_draft),
    ],
)
def test_a_wrong_residual_is_detected(shape, wrong, monkeypatch):
    """Not subtracted, not normalised before the next sibling, of the wrong rule, or a drawn draft taken for a chosen
    one."""
    monkeypatch.setattr(module, "residual", wrong)
    size, propose, block = SHAPES[shape]
    assert deviation(World.of(size), propose, block=block) > DETECTED


def _accept_the_argmax(logits, proposal, *, temperature, token_filter, generator):
    path = verify_greedy(logits, proposal).path
    p = torch.softmax(logits[path[-1] + 1 if path else 0] / temperature, dim=-1)
    return Verification(path, module.draw(p, generator))


@pytest.mark.parametrize("shape", ["chain", "block", "siblings", "chosen tree"])
def test_accepting_the_argmax_is_detected(shape, monkeypatch):
    """A draft that is the verifier's most probable token is not accepted for that."""
    monkeypatch.setattr(module, "verify_sampling", _accept_the_argmax)
    monkeypatch.setattr(module, "verify_block", _accept_the_argmax)
    size, propose, block = SHAPES[shape]
    assert deviation(World.of(size), propose, block=block) > DETECTED


def with_replacement(world: World, chances: Chances) -> Proposal:
    """Siblings with replacement that say they were drawn without."""
    tokens = [chances.pick(world.q[-1].tolist()) for _ in range(2)]
    rest = world.q[-1].index_fill(0, torch.tensor(tokens[0]), 0.0)
    return Proposal(torch.tensor(tokens), torch.tensor([-1, -1]), torch.stack([world.q[-1], rest / rest.sum()]))


def without_their_own_q(world: World, chances: Chances) -> Proposal:
    """Siblings without replacement that say they were drawn with."""
    return attrs.evolve(drawn_siblings(world, chances), probs=world.q[-1].expand(2, -1))


def chosen_as_drawn(world: World, chances: Chances) -> Proposal:
    """The most probable tokens, which say that they were drawn."""
    return attrs.evolve(chosen_chain(world, chances), probs=world.q[-1].expand(3, -1))


@pytest.mark.parametrize(
    ("propose", "block"),
    [(with_replacement, False), (without_their_own_q, False), (chosen_as_drawn, False), (chosen_as_drawn, True)],
)
def test_a_draft_that_was_not_drawn_from_its_q_is_detected(propose, block):
    """The rule is exact for the q that a draft comes from, and for no other."""
    assert deviation(World.of(8), propose, block=block) > DETECTED


def test_a_block_is_accepted_further_than_its_tokens_one_by_one():
    """The expected number of accepted drafts is never less, and here it is more."""
    propose = partial(drawn_chain, length=3)
    token, block = (
        sum(float(joint.sum()) * (length - 1) for length, joint in emitted(World.of(4), propose, block=rule).items())
        for rule in (False, True)
    )
    assert block > 1.02 * token


# With these a chi-square test at a level of 1% misses a total variation of 2% once in a hundred times: for wrong
# probabilities f its statistic has VOCAB - 1 degrees of freedom and the noncentrality N sum (f - p)^2 / p, which is at
# least N (sum |f - p|)^2 = N (2 * 0.02)^2.
DRAWS = 24_000


def test_the_sampled_tests_have_the_power_that_they_claim():
    """With these draws a deviation of 2% is detected in 99% of all cases, with a fifth of them in a quarter."""

    def power(draws: int) -> float:
        return float(ncx2.sf(chi2.isf(0.01, VOCAB - 1), VOCAB - 1, draws * (2 * 0.02) ** 2))

    assert power(DRAWS) > 0.99
    assert power(DRAWS // 5) < 0.3


def test_what_the_generator_decides_has_the_probabilities_asked_for():
    """The two choices that the tests above replace: drawing a token, and accepting one (chi-square, seeded)."""
    generator, p = torch.Generator().manual_seed(0), World.of(VOCAB).p[-1].float()
    drawn = torch.bincount(torch.tensor([module.draw(p, generator) for _ in range(DRAWS)]), minlength=VOCAB)
    assert fit_p_value(drawn, p) > 0.01
    for wanted, drafted in ((0.3, 0.4), (0.02, 0.9), (0.5, 1.0)):
        accepted = sum(module.is_accepted(wanted, drafted, generator) for _ in range(DRAWS))
        chance = wanted / drafted
        assert fit_p_value(torch.tensor([accepted, DRAWS - accepted]), torch.tensor([chance, 1 - chance])) > 0.01
    assert all(module.is_accepted(0.4, 0.3, generator) for _ in range(1000))
    assert not any(module.is_accepted(0.0, 0.3, generator) for _ in range(1000))


@pytest.mark.parametrize("block", [False, True])
def test_a_seed_decides_everything(block):
    """The same generator state gives the same verdict."""
    world = World.of(VOCAB)

    def verdict(seed: int) -> Verification:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(world.q[-1], 2, generator=generator)
        options = {"temperature": 1.0, "block_verification": block, "generator": generator}
        return verify(world.logits[[-1, *tokens.tolist()]], chain(tokens, world.q[[-1, int(tokens[0])]]), **options)

    verdicts = [verdict(seed) for _, seed in itertools.product(range(2), range(20))]
    assert verdicts[:20] == verdicts[20:]
    assert len(set(verdicts)) > 5
