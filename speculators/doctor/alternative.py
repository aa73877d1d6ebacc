"""One thing that may be wrong with a speculator: another alignment or other weights, which a replay can try."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch

from speculators.doctor.trials import DraftTrials, Trial

RENAME = "exchange them in model.safetensors, and check the name rules of the import"


@attrs.frozen(eq=False)
class Alternative:
    """An alignment other than the configured one.

    Attributes:
        what: short name.
        means: the diagnosis if this alignment is better.
        todo: the remedy in that case.
        run: replays the draft with it.
        common: whether it is one of the commonest faults of the field: these replay all answers, whatever their sample
            shows, and share half of the level, so that the many others do not hide them.
    """

    what: str
    means: str
    todo: str
    run: Callable[[DraftTrials], Trial]
    common: bool = False


# The alternatives of one kind for a speculator, or the reason why there are none.
Alternatives = list[Alternative] | str


def with_values(what: str, means: str, todo: str, values: Callable[[], Mapping[str, torch.Tensor]]) -> Alternative:
    """Makes the alternative in which some tensors have other values; they are computed only when it is tried."""
    return Alternative(what, means, todo, lambda trials: trials.attempt_weights(values()))
