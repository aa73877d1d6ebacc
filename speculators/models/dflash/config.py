"""DFlash's config (arXiv 2602.06036), in the layout that vLLM reads."""

from __future__ import annotations

from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive
from speculators.structure.validators import not_negative

WEIGHTS = ("d-pace", "exponential")


def _weights(_: object, __: attrs.Attribute[str], value: str) -> None:
    if value not in WEIGHTS:
        raise ValueError(f"must be one of {', '.join(WEIGHTS)}, got {value!r}")


def _share(_: object, __: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"must be at least 0 and below 1, got {value!r}")


def _block(_: object, __: attrs.Attribute[int], value: int) -> None:
    if value < 2:
        raise ValueError(f"must be at least 2: the anchor and one token, got {value!r}")


@SpeculatorModelConfig.register("dflash")
@attrs.frozen(kw_only=True, slots=False)
class DFlashSpeculatorConfig(SpeculatorModelConfig):
    """What a DFlash speculator is, and how it is trained.

    Attributes:
        block_size: slots of a block (B), the anchor's among them; so many less one tokens are drafted.
        mask_token_id: stands for a token not known yet; None takes that of `init_from`, or else the vocabulary's last.
        sample_from_anchor: every slot drafts the token after its own, the anchor's too: B tokens are drafted.
        sliding_window_non_causal: a block's slots all see each other; false: each sees those before it. Servers derive
            the causality of all layers from it, with and without a sliding window.
        max_anchors: blocks drawn of a row in training (M).
        weights: of the slots: "d-pace" (arXiv 2605.18810) by how likely the slots before are accepted, "exponential"
            (DFlash's own) by distance. D-PACE's are not made to sum to one: the loss is over drawn slots.
        pace: floor of an acceptance in D-PACE (its alpha).
        gamma: of the exponential decay exp(-depth / gamma); None takes 7 at 15 drafts, in proportion to drafts + 1.
        loss: weight of each loss in the mixture; D-PACE is made of "ce" alone.
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
    weights: str = knob("d-pace", validator=_weights)
    pace: float = knob(0.5, validator=_share)
    gamma: float | None = knob(None, validator=positive)
    loss: dict[str, float] = knob(factory=lambda: {"ce": 1.0}, validator=known_losses)

    def max_drafts(self) -> tuple[int, str]:
        """Returns what a block drafts: all of its slots, or all but the anchor's."""
        return self.block_size - (not self.sample_from_anchor), "block_size"

    def __attrs_post_init__(self) -> None:
        if self.weights == "d-pace" and set(self.loss) != {"ce"}:
            raise ValueError(f'weights = "d-pace" needs loss = {{ ce = 1.0 }}, got {self.loss}; or "exponential"')
