"""The exponential moving average of the weights, which is evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

# The entry of a parameter's optimizer state that holds its average.
AVERAGE = "average"


class Average:
    """Averages parameters over the updates: average_t = d average_{t-1} + (1 - d) parameter_t.

    d is min(decay, (1 + t) / (10 + t)), with t updates before this one. A fixed decay would keep the first weights for
    long; this one covers a constant share of the updates until it reaches `decay`. It depends on the number of updates
    alone, so that a checkpoint only needs the averages.

    Args:
        decay: None averages nothing.

    Attributes:
        values: the average of each parameter, in float32 and sharded as the parameter is.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], decay: float | None) -> None:
        averaged = [] if decay is None else list(parameters)
        self._decay = decay
        self.values = {parameter: parameter.detach().to(torch.float32, copy=True) for parameter in averaged}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after an update; `step` is the number of updates before it."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        for parameter, average in self.values.items():
            average.lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averages in the place of the parameters while the block runs."""
        trained = [parameter.detach().clone() for parameter in self.values]
        _copy(self.values.values(), self.values)
        try:
            yield
        finally:
            _copy(trained, self.values)


@torch.no_grad()
def _copy(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    # In place: FSDP gathers from the storage that it made for a parameter.
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
