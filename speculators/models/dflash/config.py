"""DFlash's config (arXiv 2602.06036), in the layout that vLLM reads."""

from __future__ import annotations

from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, option, positive
from speculators.structure.validators import not_negative, one_of, share


def _block(_: object, __: attrs.Attribute[int], value: int) -> None:
    if value < 2:
        raise ValueError(f"must be at least 2 (the anchor and one token), got {value!r}")


@SpeculatorModelConfig.register("dflash")
@attrs.frozen(kw_only=True, slots=False)
class DFlashSpeculatorConfig(SpeculatorModelConfig):
    """A DFlash speculator and its training.

    Attributes:
        block_size: slots of a block (B), the anchor's included; a block drafts B - 1 tokens.
        mask_token_id: stands for a token that is not known yet; None takes `init_from`'s, or the vocabulary's last.
        sample_from_anchor: every slot, also the anchor's, drafts the token after its own: B tokens per block.
        sliding_window_non_causal: all slots of a block see each other; if false, each sees those before it. Servers
            derive the causality of all layers from this key, with and without a sliding window.
        max_anchors: blocks drawn per row in training (M).
        weights: how slots are weighted: "d-pace" (arXiv 2605.18810) by how likely the slots before are accepted,
            "exponential" (DFlash's own) by distance. D-PACE's weights do not sum to one: the loss is over drawn slots.
        pace: smallest acceptance that D-PACE assumes (its alpha).
        gamma: of the exponential decay exp(-depth / gamma); None takes 7 at 15 drafts, in proportion to drafts + 1.
        until_failure: train each block up to and including its own first wrong draft, and nothing behind it (AUF, arXiv
            2607.01893).
        loss: weight of each loss in the mixture; D-PACE only allows "ce".
    """

    decoder_type: ClassVar[str] = "qwen3"
    must_say: ClassVar[tuple[str, ...]] = ("aux_hidden_state_layer_ids",)
    taken_over: ClassVar[tuple[str, ...]] = ("mask_token_id",)
    changeable: ClassVar[tuple[str, ...]] = ("block_size",)
    speculators_model_type: str = derived("dflash")
    architectures: tuple[str, ...] = derived(("DFlashSpeculator",))
    aux_hidden_state_layer_ids: tuple[int, ...] = derived(())
    target_hidden_size: int | None = derived(None)
    num_layers: int = knob(5, validator=few)
    block_size: int = attrs.field(default=16, validator=[_block, few])
    mask_token_id: int | None = attrs.field(default=None, validator=not_negative)
    sample_from_anchor: bool = False
    sliding_window_non_causal: bool = True
    max_anchors: int = knob(512, validator=positive)
    weights: str = knob("d-pace", validator=one_of("d-pace", "exponential"))
    pace: float = knob(0.5, validator=share)
    gamma: float | None = knob(None, validator=positive)
    until_failure: bool = option(False)
    loss: dict[str, float] = knob(factory=lambda: {"ce": 1.0}, validator=known_losses)

    def max_drafts(self) -> tuple[int, str]:
        """Limits a round to one block: all of its slots, or all but the anchor's."""
        return self.block_size - (not self.sample_from_anchor), "block_size"

    def __attrs_post_init__(self) -> None:
        if self.weights == "d-pace" and set(self.loss) != {"ce"}:
            raise ValueError(f'weights = "d-pace" needs loss = {{ ce = 1.0 }}, got {self.loss}; or "exponential"')
