"""The decoding protocol: what a drafter is asked for, round by round.

A chain is a tree in which each node has one child.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import attrs
import torch


@attrs.frozen(eq=False)
class Proposal:
    """The drafted tokens of one round.

    Attributes:
        tokens: [N] int64, verifier vocabulary ids, parents before children.
        parents: [N] int64, index of each node's parent in `tokens`; -1 is the last verified token.
        probs: [N, V] float32 when sampling: the distribution that each node was drawn from, over the verifier's
            vocabulary; None for greedy drafts and for drafters that propose deterministically.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    probs: torch.Tensor | None = None


def chain(tokens: torch.Tensor, probs: torch.Tensor | None = None) -> Proposal:
    """Returns the proposal in which each token follows the one before."""
    return Proposal(tokens, torch.arange(-1, len(tokens) - 1, device=tokens.device), probs)


class Drafter(Protocol):
    """Proposes tokens for one sequence.

    `target_layer_ids` names the verifier's hidden states that `begin` and `advance` want, concatenated in that order
    (id l is the residual stream entering layer l, id N the last layer's output before the final norm); () for none.
    """

    target_layer_ids: tuple[int, ...]

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        """Starts a sequence and returns its state.

        Args:
            tokens: [n + 1] int64: the prompt and the verifier's first token.
            hidden_states: [n, A*H]: the verifier's states of all tokens but the last.
        """

    def propose(
        self, state: Any, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts up to `num_tokens` tokens that follow the last one of `state`."""

    def advance(self, state: Any, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Takes in the outcome of a round.

        Args:
            tokens: [m] int64: the tokens emitted by the round, accepted drafts and the verifier's own.
            hidden_states: [m, A*H]: states of the m positions before the last of them.
        """


class Replays(Protocol):
    """The other side of a `Drafter`: the logits that its live rounds would draw from, for all places at once."""

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

        Row r (verifier states known up to place r, tokens up to r + 1) drafts the token of place r + 1 + j. Rows whose
        inputs leave their document may hold anything.

        Args:
            hidden_states: [1, S, A*H]; input_ids, position_ids, document_ids: [1, S]; as a model's `forward` has them.
            num_speculative_tokens: K.
        """
