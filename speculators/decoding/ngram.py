"""Prompt look-up: drafts the tokens after the last occurrence of the sequence's longest suffix; needs no training."""

from __future__ import annotations

import torch

from speculators.drafter import Proposal, chain


class NgramState:
    """The tokens of one sequence, indexed by n-gram.

    Attributes:
        tokens: prompt and response so far.
        after: n-gram -> index of the token that followed its last occurrence.
    """

    def __init__(self, longest: int, shortest: int = 1) -> None:
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self._longest = longest
        self._shortest = shortest

    def append(self, token: int) -> None:
        """Adds one token, as the successor of all suffixes of the tokens before it."""
        end = len(self.tokens)
        # Only n-grams that have a successor are indexed, so the current suffix never matches itself.
        for length in range(self._shortest, min(self._longest, end) + 1):
            self.after[tuple(self.tokens[end - length :])] = end
        self.tokens.append(token)


class NgramDrafter:
    """Drafts by the longest match, deterministically and so without probabilities; nothing without a match.

    Args:
        longest: length of the longest suffix to look up, in tokens; shorter ones are tried after it.
        shortest: length of the shortest suffix to try.
    """

    target_layer_ids: tuple[int, ...] = ()

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        self.longest = longest
        self.shortest = shortest

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> NgramState:
        """Starts a sequence; see `Drafter`."""
        state = NgramState(self.longest, self.shortest)
        self.advance(state, tokens, hidden_states)
        return state

    def propose(
        self, state: NgramState, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts up to `num_tokens` tokens; see `Drafter`."""
        for length in range(min(self.longest, len(state.tokens)), self.shortest - 1, -1):
            start = state.after.get(tuple(state.tokens[-length:]))
            if start is not None:
                return chain(torch.tensor(state.tokens[start : start + num_tokens]))
        return chain(torch.empty(0, dtype=torch.int64))

    def advance(self, state: NgramState, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens that a round emitted; see `Drafter`."""
        for token in tokens.tolist():
            state.append(token)
