"""What drafted trees grow from (`speculators.drafter.Branches`): a recurrent model's steps, or slots known at once."""

from __future__ import annotations

from typing import Any

import torch

from speculators.nn.cache import KeyBuffer


class SlotBranches:
    """The logits of slots that do not depend on what was drafted before.

    Args:
        logits: [K, D], of each depth.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self._levels = iter(logits.split(1))

    def first(self) -> torch.Tensor:
        """Gives the first slot's logits; see `Branches`."""
        return next(self._levels)

    def below(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Gives the next slot's logits, [1, D]; see `Branches`."""
        return next(self._levels)


class RecurrentBranches:
    """One step of a recurrent model per level, over all nodes of the level above.

    Args:
        model: a `RecurrentModel` in evaluation mode.
        cache: keys of the verified rows; those of the nodes are written behind them.
        state: [1, H], what depth 0 left at the last row.
    """

    def __init__(self, model: Any, cache: KeyBuffer, state: torch.Tensor) -> None:
        self._model, self._cache, self._state = model, cache, state
        self._depth = 0
        # [R, N]: which of the N nodes so far each of the R nodes of the last level sees.
        self._sees = torch.zeros(1, 0, dtype=torch.bool, device=state.device)

    def first(self) -> torch.Tensor:
        """Reads the state that depth 0 left; see `Branches`."""
        return self._logits()

    @torch.no_grad()
    def below(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Steps from each parent's state with its node's token; see `Branches`."""
        model, count, device = self._model, len(tokens), tokens.device
        self._depth += 1
        # A node sees itself, and what its parent sees.
        itself = torch.eye(count, dtype=torch.bool, device=device)
        self._sees = torch.cat((self._sees[parents], itself), 1)
        attend = self._cache.attend_tree(self._sees, scale=model.scale, window=model.window)
        position = torch.full((count,), self._cache.length - 1 + self._depth, device=device)
        self._state = model.step(self._state[parents], tokens, position, attend, None)
        return self._logits()

    def _logits(self) -> torch.Tensor:
        logits: torch.Tensor = self._model.logits(self._model.read(self._state))
        return logits
