"""What the proofs of all algorithms share: overfitting, packing, judged responses, live decoding of one, exactness."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from chances import Chances, every_outcome, total_variation

from speculators.bench.replay import replay
from speculators.bench.rows import JudgedResponse, Response, judge
from speculators.bench.walk import greedy_rounds
from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.drafter import Proposal
from speculators.model import SpeculatorModel
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.weights import load_head

from .conftest import LAYER_IDS, World

K = 3
INPUTS = ("hidden_states", "input_ids", "position_ids", "document_ids")
# float32 sums in another order; losses are of order 10.
TOLERANCE = 5e-5


def row_of(world: World, model, *which: int) -> dict[str, torch.Tensor]:
    """A packed row of some conversations with the states that the model reads."""
    return world.row(*which, layer_ids=world.layer_ids(model.config))


def with_padding(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The row with four places of padding after the first document and at the end."""
    holes = torch.full((1, 4), -1)
    first = int((row["document_ids"] == 0).sum())
    padded = {}
    for key, tensor in row.items():
        fill = holes if key == "document_ids" else torch.zeros(1, 4, *tensor.shape[2:], dtype=tensor.dtype)
        padded[key] = torch.cat([tensor[:, :first], fill, tensor[:, first:], fill], dim=1)
    return padded


def fit(model, kwargs, row, steps=200, lr=5e-3):
    """Overfits one row, the learning rate falling to 0 in the last quarter, and returns the last metrics."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 4 * (1 - step / steps))
        _, loss, metrics = model(**row, **kwargs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def gradients(model, kwargs, row, share: float = 1.0) -> tuple[float, list[torch.Tensor]]:
    """The loss of a row times `share`, and its gradient for every trained parameter."""
    _, loss, _ = model(**row, **kwargs)
    loss = loss * share
    return float(loss.detach()), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def check_packed_equals_unpacked(
    model, kwargs, packed: dict[str, torch.Tensor], singles: Sequence[dict[str, torch.Tensor]]
) -> None:
    """Loss and gradients of a packed row are those of its documents one by one; padding changes nothing."""
    total = packed["loss_mask"].sum()
    parts = [gradients(model, kwargs, row, float(row["loss_mask"].sum() / total)) for row in singles]
    wanted = sum(loss for loss, _ in parts)
    sums = [sum(grads) for grads in zip(*(grads for _, grads in parts), strict=True)]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for row in (packed, with_padding(packed)):
        loss, grads = gradients(model, kwargs, row)
        assert abs(loss - wanted) < TOLERANCE
        for name, mine, theirs in zip(names, grads, sums, strict=True):
            assert (mine - theirs).abs().max() < TOLERANCE, name


def check_packed_conversations(world: World, model, kwargs) -> None:
    """Three conversations in one row are what they are one by one."""
    singles = [row_of(world, model, index) for index in (0, 1, 2)]
    check_packed_equals_unpacked(model, kwargs, row_of(world, model, 0, 1, 2), singles)


def check_documents_are_apart(world: World, model) -> None:
    """The content of a later document or of padding changes no draft logit of the first document."""
    row = {key: tensor for key, tensor in row_of(world, model, 0, 1).items() if key in INPUTS}
    length = int((row["document_ids"] == 0).sum())
    other = {key: tensor.clone() for key, tensor in row.items()}
    other["hidden_states"][:, length:] += 1.0
    other["input_ids"][:, length:] = 5
    other["document_ids"][:, length + 2 :] = -1
    depths = (model.replay(**each, num_speculative_tokens=K) for each in (row, other))
    # Rows whose inputs leave the document may hold anything.
    for mine, theirs in zip(*depths, strict=True):
        assert (mine - theirs)[: length - K - 1].abs().max() < TOLERANCE


def check_empty_row(world: World, model, kwargs) -> None:
    """A row without supervised tokens has a loss and gradients of 0, for every parameter, never nan."""
    row = row_of(world, model, 0)
    row["loss_mask"] = torch.zeros_like(row["loss_mask"])
    loss, grads = gradients(model, kwargs, row)
    assert loss == 0.0
    assert all(grad.abs().max() == 0 for grad in grads)


def check_saved_is_the_same(world: World, model, folder: Path) -> SpeculatorModel:
    """A saved speculator loads with equal logits at every depth; returns what was loaded."""
    model.save_pretrained(folder)
    loaded = SpeculatorModel.from_pretrained(folder)
    row = {key: tensor for key, tensor in row_of(world, model, 0).items() if key in INPUTS}
    model.eval()
    depths = (each.replay(**row, num_speculative_tokens=K) for each in (model, loaded))
    for mine, theirs in zip(*depths, strict=True):
        assert torch.equal(mine, theirs)
    return loaded


def judged(world: World, which, temperature=0.0, layer_ids=LAYER_IDS) -> list[JudgedResponse]:
    """The verifier's own responses to some of the prompts, as replay takes them."""
    head = load_head(world.folder, world.engine.facts)
    rows = []
    for index in which:
        tokens = (*world.prompts[index], *world.answers[index])
        response = Response(id=str(index), category="", tokens=tokens, prompt_length=len(world.prompts[index]))
        states, last = world.engine.capture([torch.tensor(tokens)], layer_ids)[0]
        rows.append(judge(head, response, states, last, temperature=temperature))
    return rows


def accepted_share(world: World, model, which, k: int = K) -> float:
    """Accepted drafts over all drafts, K a round less those past the end of a response, at T = 0.

    A draft behind a refused one counts as refused, so that 1 is the largest acceptance length there is.
    """
    rows = judged(world, which, layer_ids=world.layer_ids(model.config))
    accepted = drafted = 0
    for table in replay(model, rows, k_max=k, temperature=0.0).acceptance:
        rounds = greedy_rounds(table, k)
        accepted += sum(number for _, number in rounds)
        drafted += sum(min(k, len(table) - anchor) for anchor, _ in rounds)
    return accepted / drafted


def live(world: World, model, row: JudgedResponse, *, num_tokens: int) -> Decoded:
    """Decodes one prompt greedily with the model's own drafter."""
    drafter = model.draft()
    return decode(
        CachedVerifier(world.engine.model, drafter.target_layer_ids),
        drafter,
        torch.tensor(row.response.prompt),
        max_new_tokens=len(row.response.answer),
        num_tokens=num_tokens,
        temperature=0.0,
        generator=None,
        stop_ids=frozenset(world.engine.stop_ids),
    )


def check_replay_equals_live(world: World, model, which=range(6), k: int = K) -> tuple[Any, list[Decoded]]:
    """Each round of the live decode accepts what replay says, and gives the verifier's own tokens; returns both."""
    rows = judged(world, which, layer_ids=world.layer_ids(model.config))
    replayed = replay(model, rows, k_max=k, temperature=0.0)
    decoded = [live(world, model, row, num_tokens=k) for row in rows]
    for row, table, one in zip(rows, replayed.acceptance, decoded, strict=True):
        assert tuple(one.tokens) == row.response.answer
        assert [(each.anchor, each.accepted) for each in one.rounds] == greedy_rounds(table, k)
    return replayed, decoded


def check_replay_logits_equal_live(world: World, model, monkeypatch, module, depths: int = K) -> None:
    """At every depth the logits that a live round draws from are the replay's, within float32 of another order.

    The live round is made to draft the row's own tokens, by replacing the choice of a token in `module`.
    """
    tokens = torch.tensor(world.prompts[1] + world.answers[1])
    states = world.engine.capture([tokens], world.layer_ids(model.config))[0][0]
    row = {
        "hidden_states": states[None],
        "input_ids": tokens[None],
        "position_ids": torch.arange(len(tokens))[None],
        "document_ids": torch.zeros(1, len(tokens), dtype=torch.int64),
    }
    replayed = list(model.replay(**row, num_speculative_tokens=depths))
    known = {int(target): draft for draft, target in enumerate(model.draft_to_target.tolist())}
    seen: list[torch.Tensor] = []
    forced: list[int] = []

    def choose(logits, temperature, generator):
        seen.append(logits)
        return torch.tensor([forced[len(seen) - 1]]), None

    monkeypatch.setattr(module, "pick", choose)
    drafter = model.draft()
    state = drafter.begin(tokens[:4], states[:3])
    for anchor in range(2, len(tokens) - depths - 2):
        wanted = tokens[anchor + 2 : anchor + 2 + depths].tolist()
        if all(token in known for token in wanted):
            seen.clear()
            forced[:] = [known[token] for token in wanted]
            drafter.propose(state, num_tokens=depths, temperature=0.0, generator=None)
            for depth, logits in enumerate(seen):
                scale = replayed[depth][anchor].abs().max()
                assert (logits - replayed[depth][anchor]).abs().max() < 1e-5 * scale, (anchor, depth)
        drafter.advance(state, tokens[anchor + 2 : anchor + 3], states[anchor + 1 : anchor + 2])


# So warm that drafts of random matrices are accepted now and then.
SIZE, DRAFTED, PROMPT, FIRST, TEMPERATURE = 3, [0, 2], [1, 0, 1], 2, 2.0


def world_of_three_tokens(folder: Path) -> World:
    """A verifier with three tokens, of which a reduced draft vocabulary holds two."""
    make_tiny_verifier(folder, vocab_size=SIZE, num_hidden_layers=4, seed=3, pad_token_id=None)
    return World(folder, Engine(folder, dtype="float32"), [], [DRAFTED])


class TabledVerifier:
    """All that a verifier can say after a prompt and a first token, computed once; as decoding sees a verifier.

    The first token is given, not drawn: no draft precedes it.

    Args:
        depth: tokens after the first that it can be asked about.
        layer_ids: as of `CachedVerifier`.
    """

    def __init__(self, engine: Engine, *, depth: int, layer_ids: Sequence[int]) -> None:
        self.device, self.depth = engine.device, depth
        every = [torch.tensor([*PROMPT, FIRST, *tail]) for tail in itertools.product(range(SIZE), repeat=depth)]
        self.states = torch.stack([states for states, _ in engine.capture(every, layer_ids)])
        with torch.no_grad():
            self.logits = engine.model(torch.stack(every)).logits
        self.known: list[int] = []
        self.scored: list[int] = []

    def prefill(self, tokens: torch.Tensor, *, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert tokens.tolist() == PROMPT
        self.known = []
        return torch.full((SIZE,), -1e9).index_fill(0, torch.tensor(FIRST), 0.0), self.states[0, : len(PROMPT)]

    def score(self, token: int, proposal: Proposal | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.scored = [token, *(proposal.tokens.tolist() if proposal is not None else [])]
        response = [*self.known, *self.scored]
        digits = [*response[1:], *[0] * (self.depth + 1 - len(response))]
        index = sum(digit * SIZE**power for power, digit in enumerate(reversed(digits)))
        places = slice(len(PROMPT) + len(self.known), len(PROMPT) + len(response))
        return self.logits[index, places], self.states[index, places]

    def keep(self, path: Sequence[int]) -> None:
        self.known += [self.scored[0], *(self.scored[1 + node] for node in path)]

    def two_tokens(self) -> torch.Tensor:
        """[3, 3] exact probabilities of the two tokens that follow the first."""
        log_p = torch.log_softmax(self.logits / TEMPERATURE, -1)
        each = SIZE ** (self.depth - 1)
        return (log_p[0, len(PROMPT)][:, None] + log_p[::each, len(PROMPT) + 1]).exp()


def scramble(model):
    """Makes all trainable matrices random; returns the model."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def check_sampling_is_exact(world: World, model) -> list[Decoded]:
    """The two tokens after the first of a live response have their exact probabilities, over all outcomes of the
    drafter's and of the verification's choices, by either rule; 1e-6 is float32 rounding.

    Args:
        model: scrambled, so that drafts are far from the verifier, depend on each other, and are often refused.

    Returns:
        The responses, one for each outcome of the choices.
    """
    drafter = model.eval().draft()
    verifier: Any = TabledVerifier(world.engine, depth=3, layer_ids=drafter.target_layer_ids)
    options = {"max_new_tokens": 3, "num_tokens": 2, "temperature": TEMPERATURE}
    every: list[Decoded] = []
    for block in (False, True):

        def respond(chances: Chances, block: bool = block) -> Decoded:
            prompt = torch.tensor(PROMPT)
            return decode(verifier, drafter, prompt, generator=chances, block_verification=block, **options)

        found = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for one, weight in every_outcome(respond):
            found[one.tokens[1:]] += weight
            every.append(one)
        assert total_variation(found, verifier.two_tokens()) < 1e-6
    assert {one.rounds[0].accepted for one in every} == {0, 1, 2}
    return every
