"""The decoding protocol: what a drafter implements to propose tokens round by round.

A proposal is a tree of tokens; a chain is a tree in which each node has one child.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import attrs
import torch


@attrs.frozen(eq=False)
class Proposal:
    """The drafted tokens of one round.

    Attributes:
        tokens: [N] int64, verifier vocabulary ids, parents before children.
        parents: [N] int64, index of each node's parent in `tokens`; -1 is the last verified token.
        probs: [N, V] float32 when sampling: the distribution that each node was drawn from, over the verifier's
            vocabulary; None for greedy and for deterministic drafts.

    Example:
        Proposal(tokens=torch.tensor([5, 9]), parents=torch.tensor([-1, 0]))
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    probs: torch.Tensor | None = None


def chain(tokens: torch.Tensor, probs: torch.Tensor | None = None) -> Proposal:
    """Makes the proposal in which each token follows the one before."""
    return Proposal(tokens, torch.arange(-1, len(tokens) - 1, device=tokens.device), probs)


class Drafter(Protocol):
    """Proposes tokens for one sequence; `SpeculatorModel.draft` returns one.

    `target_layer_ids` names the verifier's hidden states that `begin` and `advance` read, concatenated in that order:
    id l is the residual stream entering layer l, id N the last layer's output before the final norm. () reads none.

    Example:
        state = drafter.begin(tokens, hidden_states)
        proposal = drafter.propose(state, num_tokens=5, temperature=0.0, generator=None)
        drafter.advance(state, emitted, hidden_states_of_the_round)
    """

    target_layer_ids: tuple[int, ...]

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        """Starts a sequence and returns the drafter's state for it.

        Args:
            tokens: [n + 1] int64: the prompt and the verifier's first token.
            hidden_states: [n, A*H]: the verifier's states of all tokens but the last.
        """

    def propose(
        self, state: Any, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts up to `num_tokens` tokens that follow the last token of `state`."""

    def advance(self, state: Any, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Updates the state with the outcome of a round, or of several if others proposed in some.

        Args:
            tokens: [m] int64: the tokens that were emitted, of a round accepted drafts and then the verifier's own.
            hidden_states: [m, A*H]: states of the m positions before the last of these tokens.
        """


class Branches(Protocol):
    """The draft logits of one round's tree, which grows level by level."""

    def first(self) -> torch.Tensor:
        """Computes the logits [1, D] of the tokens that follow the last verified one."""

    def below(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Computes the logits [M, D] of the tokens below M nodes, or [1, D] where all nodes have the same.

        Args:
            parents: [M] int64, each node's parent: its index among the nodes of the last call, 0 in the first call.
            tokens: [M] int64 of the nodes, in the verifier's vocabulary.
        """


@runtime_checkable
class DraftsTrees(Drafter, Protocol):
    """A drafter that also drafts trees; see `speculators/decoding/trees.py`."""

    @property
    def draft_to_target(self) -> torch.Tensor:
        """[D] int64, the verifier's id of each draft id."""

    def begin_tree(self, state: Any, num_levels: int) -> Branches:
        """Starts a tree of up to `num_levels` levels below the last token of `state`."""


@runtime_checkable
class IndependentSlots(Protocol):
    """A `Replays` whose logits at one depth may be the same whatever was drafted before."""

    @property
    def independent_slots(self) -> bool:
        """Whether they are, so that one pass gives every tree."""


class Replays(Protocol):
    """The teacher-forced counterpart of a `Drafter`: the logits of its live rounds, for all places at once."""

    @property
    def draft_to_target(self) -> torch.Tensor:
        """[D] int64, the verifier's id of each draft id."""

    def replay(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> Iterator[torch.Tensor]:
        """Yields for depth j = 1..K the draft logits [S, D] with the row's own tokens as input.

        Row r knows the verifier's states up to place r and the tokens up to r + 1, and drafts the token of place
        r + 1 + j. Logits of rows whose inputs cross a document's end are ignored.

        Args:
            hidden_states: [1, S, A*H]; input_ids, position_ids, document_ids: [1, S]; as in a model's `forward`.
            num_speculative_tokens: K.
        """
