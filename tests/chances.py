"""Runs a program through every outcome of its random choices, so that its distribution is known and not estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch

from speculators.decoding import verify as verify_module


@attrs.define
class Chances:
    """The choices of one run: those of `script` are repeated, and from each later one the first outcome is taken.

    Attributes:
        script: outcomes of the first choices.
        taken: outcomes of all choices so far.
        weight: their probability.
        untried: scripts that begin like this run and then take another outcome.
    """

    script: tuple[int, ...]
    taken: tuple[int, ...] = ()
    weight: float = 1.0
    untried: list[tuple[int, ...]] = attrs.field(factory=list)

    def pick(self, weights: Sequence[float]) -> int:
        """Chooses an index with a probability proportional to its weight."""
        possible = [index for index, weight in enumerate(weights) if weight > 0]
        if len(self.taken) < len(self.script):
            index = self.script[len(self.taken)]
        else:
            index = possible[0]
            self.untried += [(*self.taken, other) for other in possible[1:]]
        self.taken += (index,)
        self.weight *= weights[index] / sum(weights)
        return index


def every_outcome(program: Callable[[Chances], Any]) -> Iterator[tuple[Any, float]]:
    """Yields what each run of the program returns, and its probability.

    Meanwhile drafters and verification choose by the `Chances` that they are given in place of a generator.
    """
    multinomial = torch.multinomial

    def draw(p: torch.Tensor, number: int, *, generator: Any = None, **options: Any) -> torch.Tensor:
        if not isinstance(generator, Chances):
            return multinomial(p, number, generator=generator, **options)
        assert number == 1
        return torch.tensor([generator.pick(p.tolist())])

    scripts: list[tuple[int, ...]] = [()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        patch.setattr(verify_module, "is_accepted", _is_accepted)
        while scripts:
            chances = Chances(scripts.pop())
            result = program(chances)
            scripts += chances.untried
            yield result, chances.weight


def _is_accepted(p: float, q: float, chances: Chances) -> bool:
    accepted = min(1.0, p / q) if q > 0 else float(p > 0)
    return chances.pick([1.0 - accepted, accepted]) == 1


def total_variation(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Computes half the summed difference of two distributions of the same shape, each of sum 1."""
    torch.testing.assert_close(found.sum(), torch.ones((), dtype=found.dtype), rtol=1e-5, atol=0)
    return 0.5 * float((found - exact).abs().sum())
