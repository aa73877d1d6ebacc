"""P-EAGLE's config (arXiv 2602.01469), in the layout that vLLM reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive
from speculators.structure.validators import not_negative


def _share(_: object, __: attrs.Attribute[float], value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, got {value!r}")


@SpeculatorModelConfig.register("peagle")
@attrs.frozen(kw_only=True, slots=False)
class PEagleSpeculatorConfig(SpeculatorModelConfig):
    """A P-EAGLE speculator and its training.

    Attributes:
        mask_token_id: stands for a token that is not known yet; None takes `init_from`'s, or the vocabulary's last.
        norm_before_residual: the first layer's residual is the normed state instead of the state.
        norm_before_fc: one RMSNorm over the A concatenated states before `fc`.
        num_depths: depths trained, and so the most tokens that are drafted well.
        keep: depth d keeps about keep ** d of the anchors ("conditional drop-out of tokens", section 3.2).
        keep_min: smallest share of the anchors that a depth keeps.
        max_anchors: most anchors per row that have depths beyond the first; if there are more, the drawn ones weigh
            more.
        loss: weight of each loss in the mixture.
        lm_head_trainable: train the head, which starts as the verifier's rows, instead of keeping it frozen.
    """

    must_say: ClassVar[tuple[str, ...]] = ("eagle_aux_hidden_state_layer_ids",)
    unsupported: ClassVar[Mapping[str, str]] = {
        "fc_norm": "vLLM ignores it in a P-EAGLE draft, and would read states that are not normed",
        "norm_output": "vLLM ignores it in a P-EAGLE draft",
    }
    taken_over: ClassVar[tuple[str, ...]] = ("mask_token_id",)
    speculators_model_type: str = derived("peagle")
    architectures: tuple[str, ...] = derived(("PEagleSpeculator",))
    eagle_aux_hidden_state_layer_ids: tuple[int, ...] = derived(())
    target_hidden_size: int | None = derived(None)
    embed_requires_grad: bool = derived(False)
    mask_token_id: int | None = attrs.field(default=None, validator=not_negative)
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    num_depths: int = knob(8, validator=few)
    keep: float = knob(0.7, validator=_share)
    keep_min: float = knob(0.2, validator=_share)
    max_anchors: int = knob(512, validator=positive)
    loss: dict[str, float] = knob(factory=lambda: {"kl_div": 1.0}, validator=known_losses)
    lm_head_trainable: bool = knob(False)
