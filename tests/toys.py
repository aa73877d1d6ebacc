"""A toy speculator with the decoding protocol and the replay hook: fast, stateful, and deliberately bad on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from scipy.stats import chisquare
from torch import nn

from speculators.drafter import Proposal

DECAY = 0.5


class ToySpeculator(nn.Module):
    """A recurrent draft model: c_r decays over all states of the document, g_1 = tanh(A c_r + E x_{r+1}), then
    g_j = tanh(B g_{j-1} + E x_{r+j}); logits are `sign` times head(g_j). With sign -1 a trained one is an adversary."""

    def __init__(
        self,
        *,
        state_size: int,
        vocab_size: int,
        draft_to_target: torch.Tensor | None = None,
        target_layer_ids: tuple[int, ...] = (1, 2, 4),
        width: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        ids = torch.arange(vocab_size) if draft_to_target is None else draft_to_target
        self.register_buffer("draft_to_target", ids)
        self.vocab_size = vocab_size
        self.target_layer_ids = target_layer_ids
        self.sign = 1.0
        self.read = nn.Linear(state_size, width, bias=False)
        self.back = nn.Linear(width, width, bias=False)
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, len(ids), bias=False)

    def logits(self, g: torch.Tensor) -> torch.Tensor:
        return self.sign * self.head(g).float()

    def replay(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> Iterator[torch.Tensor]:
        states, tokens = hidden_states[0], input_ids[0]
        summary = []
        carry = torch.zeros_like(states[0])
        for row, first in enumerate((position_ids[0] == 0).tolist()):
            carry = states[row] + (0.0 if first else DECAY) * carry
            summary.append(carry)
        g = None
        for depth in range(1, num_speculative_tokens + 1):
            e = self.embed(tokens.roll(-depth))
            g = torch.tanh((self.read(torch.stack(summary)) if g is None else self.back(g)) + e)
            yield self.logits(g)

    def draft(self) -> ToyDrafter:
        return ToyDrafter(self)


class ToyDrafter:
    """Live drafting with a `ToySpeculator`; `branches` > 1 drafts that many siblings at each depth of the main path."""

    def __init__(self, model: ToySpeculator, branches: int = 1) -> None:
        self.model = model
        self.branches = branches
        self.target_layer_ids = model.target_layer_ids

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"carry": torch.zeros_like(hidden_states[0])}
        self.advance(state, tokens, hidden_states)
        return state

    def advance(self, state: dict[str, Any], tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        for row in hidden_states:
            state["carry"] = row + DECAY * state["carry"]
        state["token"] = tokens[-1]

    def propose(
        self, state: dict[str, Any], *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        model = self.model
        tokens: list[torch.Tensor] = []
        parents: list[int] = []
        probs: list[torch.Tensor] = []
        g, last, root = None, state["token"], -1
        for _ in range(num_tokens):
            before = model.read(state["carry"]) if g is None else model.back(g)
            g = torch.tanh(before + model.embed(last))
            drawn = self._draw(model.logits(g), temperature, generator)
            for token, q in drawn:
                tokens.append(token)
                parents.append(root)
                probs.append(q)
            # The main path follows the first sibling.
            root, last = len(tokens) - len(drawn), drawn[0][0]
        q = torch.stack(probs) if temperature > 0 else None
        return Proposal(torch.stack(tokens), torch.tensor(parents), q)

    def _draw(
        self, logits: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ids = self.model.draft_to_target
        if temperature == 0:
            return [(ids[index], logits) for index in logits.topk(self.branches).indices]
        q = torch.softmax(logits / temperature, dim=-1)
        drawn = []
        for _ in range(self.branches):
            index = torch.multinomial(q, 1, generator=generator)[0]
            full = torch.zeros(self.model.vocab_size).index_put_((ids,), q)
            drawn.append((ids[index], full))
            q = q.index_fill(0, index, 0.0)
            q = q / q.sum()
        return drawn


def hidden_states_of(model: Any, tokens: Sequence[int], layer_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes states [n, A*H] and the last layer's output before the final norm [n, H] in one uncached forward."""
    caught: dict[str, torch.Tensor] = {}
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: caught.update(last=args[0]))
    with torch.no_grad():
        states = model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
    hook.remove()
    entering = [*states[:-1], caught["last"]]
    return torch.cat([entering[layer][0] for layer in layer_ids], dim=-1), caught["last"][0]


def greedy_response(model: Any, prompt: Sequence[int], *, length: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """Computes the verifier's greedy continuation with one full forward per token: no cache and none of our code."""
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + length and (len(tokens) == len(prompt) or tokens[-1] not in stop_ids):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def train_toy(
    toy: ToySpeculator, model: Any, sequences: Sequence[Sequence[int]], *, depths: int = 5, steps: int = 60
) -> None:
    """Trains the toy on the next tokens of the sequences."""
    target_to_draft = torch.full((toy.vocab_size,), -1)
    target_to_draft[toy.draft_to_target] = torch.arange(len(toy.draft_to_target))
    rows = [(torch.tensor(list(each)), hidden_states_of(model, each, toy.target_layer_ids)[0]) for each in sequences]
    tokens = torch.cat([each for each, _ in rows])
    positions = torch.cat([torch.arange(len(each)) for each, _ in rows])
    batch = {
        "hidden_states": torch.cat([states for _, states in rows])[None],
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "document_ids": torch.cumsum(positions == 0, dim=0)[None] - 1,
    }
    optimizer = torch.optim.Adam(toy.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.zeros(())
        for depth, logits in enumerate(toy.replay(**batch, num_speculative_tokens=depths), start=1):
            targets = target_to_draft[tokens[depth + 1 :]]
            known = targets >= 0
            loss = loss + nn.functional.cross_entropy(logits[: -depth - 1][known], targets[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    toy.eval()


def fit_p_value(seen: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Computes the chi-square p-value of counts against exact probabilities of the same shape.

    Outcomes that are expected fewer than five times (the usual condition of the test) are counted together.
    """
    expected = probabilities.double() / probabilities.double().sum() * float(seen.sum())
    large = expected >= 5
    observed = torch.cat([seen[large].double(), seen[~large].double().sum()[None]])
    counts = torch.cat([expected[large], expected[~large].sum()[None]])
    there = counts > 0
    return float(chisquare(observed[there].numpy(), counts[there].numpy()).pvalue)
