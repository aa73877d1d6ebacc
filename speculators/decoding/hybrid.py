"""Hybrid drafting: a look-up proposes where it finds a long enough match, and a speculator drafts elsewhere."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from speculators.drafter import Drafter, Proposal


@attrs.define(eq=False)
class _Sequence:
    """State of one decoded sequence.

    Attributes:
        look_up: the look-up's state.
        speculator: the speculator's state, without the tokens of `unread`.
        unread: tokens and hidden states of the rounds since the speculator last drafted, which it has yet to read.
    """

    look_up: Any
    speculator: Any
    unread: list[tuple[torch.Tensor, torch.Tensor]] = attrs.field(factory=list)


class HybridDrafter:
    """Drafts with a look-up where it has a match, and with a speculator in all other rounds.

    The speculator does not run in a round in which the look-up proposes. Before it drafts again, it reads the tokens of
    all such rounds at once.

    Args:
        look_up: reads tokens only, and proposes nothing where no match is long enough.
        speculator: drafts in all other rounds.

    Source: the hybrid of Oliaro et al. 2411.04975, which decides by a match's score; here its length decides.
    """

    def __init__(self, look_up: Drafter, speculator: Drafter) -> None:
        self._look_up = look_up
        self._speculator = speculator
        self.target_layer_ids = speculator.target_layer_ids

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> _Sequence:
        """Starts a sequence; see `Drafter`."""
        return _Sequence(*(each.begin(tokens, hidden_states) for each in (self._look_up, self._speculator)))

    def propose(
        self, state: _Sequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts up to `num_tokens` tokens; see `Drafter`."""
        matched = self._look_up.propose(
            state.look_up, num_tokens=num_tokens, temperature=temperature, generator=generator
        )
        if len(matched.tokens):
            return matched
        if state.unread:
            tokens, hidden_states = (torch.cat(parts) for parts in zip(*state.unread, strict=True))
            self._speculator.advance(state.speculator, tokens, hidden_states)
            state.unread.clear()
        return self._speculator.propose(
            state.speculator, num_tokens=num_tokens, temperature=temperature, generator=generator
        )

    def advance(self, state: _Sequence, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens that a round emitted; see `Drafter`."""
        self._look_up.advance(state.look_up, tokens, hidden_states)
        state.unread.append((tokens, hidden_states))
