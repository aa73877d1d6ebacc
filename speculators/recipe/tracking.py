"""The section of a recipe that says which trackers receive a run's curves."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import field

from speculators.structure.validators import one_of

SINKS = ("tensorboard", "wandb", "mlflow")


@attrs.frozen(kw_only=True)
class TrackingSection:
    """`[tracking]`: where a run's curves also go. It changes no result, so no fingerprint contains it.

    Attributes:
        sinks: trackers that receive loss and acceptance besides `events.jsonl`, which is always written; each is an
            optional extra of the same name.
    """

    sinks: tuple[str, ...] = field(default=())

    @sinks.validator
    def _known_and_distinct(self, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
        for sink in value:
            one_of(*SINKS)(self, attribute, sink)
        if len(set(value)) != len(value):
            raise ValueError(f"must have distinct values, got {list(value)}")
