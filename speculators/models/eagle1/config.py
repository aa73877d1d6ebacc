"""EAGLE's config (arXiv 2401.15077), with the training of HASS (arXiv 2408.15766) as options."""

from __future__ import annotations

from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive
from speculators.structure.validators import not_negative


@SpeculatorModelConfig.register("eagle1")
@attrs.frozen(kw_only=True, slots=False)
class Eagle1SpeculatorConfig(SpeculatorModelConfig):
    """An EAGLE speculator and its training.

    Recipes cannot set `target_layer_ids`: the draft reads the last layer's state.

    Attributes:
        alignment_steps: depths unrolled in training, each on the state that the draft itself left; 1 is EAGLE, HASS
            takes 3.
        alignment_decay: step k's losses have weight alignment_decay ** k.
        regression: weight of the smooth L1 distance between the draft's state and the verifier's.
        loss: weight of each loss between the distributions; kl_div is the paper's cross-entropy less p's entropy.
        topk: HASS's distillation at every step, a cross-entropy over this many of the verifier's most likely tokens of
            the draft vocabulary; its paper takes 10, and 0 leaves it out, as EAGLE does.
        topk_weight: weight of that loss.
        noise: training adds U(-noise, noise) to the verifier's states (section 4, "Training").
    """

    taken_over: ClassVar[tuple[str, ...]] = ("fc_bias",)
    speculators_model_type: str = derived("eagle1")
    architectures: tuple[str, ...] = derived(("Eagle1DraftModel",))
    target_layer_ids: tuple[int, ...] | None = derived(None)
    # Published checkpoints have a bias; training here has one only if it starts from such a checkpoint.
    fc_bias: bool = derived(False)
    alignment_steps: int = knob(1, validator=few)
    alignment_decay: float = knob(1.0, validator=positive)
    regression: float = knob(1.0, validator=not_negative)
    loss: dict[str, float] = knob(factory=lambda: {"kl_div": 0.1}, validator=known_losses)
    topk: int = knob(0, validator=not_negative)
    topk_weight: float = knob(1.0, validator=positive)
    noise: float = knob(0.1, validator=not_negative)

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """Reads the last layer's output, whatever the recipe says."""
        return (num_layers,)
