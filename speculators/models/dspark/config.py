"""DSpark's config (arXiv 2607.05147), in the layout that vLLM reads."""

from __future__ import annotations

from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive
from speculators.structure.validators import not_negative

MARKOV_HEADS = ("vanilla", "gated", "rnn")
CUTS = ("threshold", "gain")


def _markov(_: object, __: attrs.Attribute[str], value: str) -> None:
    if value not in MARKOV_HEADS:
        raise ValueError(f"must be one of {', '.join(MARKOV_HEADS)}, got {value!r}")


def _cut(_: object, __: attrs.Attribute[str | None], value: str | None) -> None:
    if value is not None and value not in CUTS:
        raise ValueError(f"must be one of {', '.join(CUTS)}, or left out, got {value!r}")


def _share(_: object, __: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"must be above 0 and below 1, got {value!r}")


@SpeculatorModelConfig.register("dspark")
@attrs.frozen(kw_only=True, slots=False)
class DSparkSpeculatorConfig(SpeculatorModelConfig):
    """What a DSpark speculator is, and how it is trained.

    Attributes:
        block_size: slots of a block (B), each of which drafts the token after its own.
        mask_token_id: stands for a token not known yet; None takes that of `init_from`, or else the vocabulary's last.
        sliding_window_non_causal: a block's slots all see each other; false: each sees those before it.
        markov_rank: width r of the embedding of the token before, from which each slot's logits get a bias.
        markov_head_type: "vanilla" takes the embedding, "gated" as much of it as the slot's state lets through, "rnn"
            a recurrent state over the block.
        confidence_head_with_markov: the confidence reads the embedding, too.
        cut: where a live block ends: "threshold" before the first slot that is reached with a lower probability,
            "gain" before the first whose expected token is worth less than its cost; None never.
        threshold: of the probability; or what one more drafted token costs in tokens without drafts, which `spec bench`
            measures with two K or more, and takes with `--set`.
        max_anchors: blocks drawn of a row in training.
        gamma: of the exponential decay exp(-depth / gamma) of the slots' weights; None takes 7 at 15 drafts.
        confidence_weight: of the confidence's cross-entropy beside the loss.
        loss: weight of each loss in the mixture.
    """

    decoder_type: ClassVar[str] = "qwen3"
    must_say: ClassVar[tuple[str, ...]] = ("aux_hidden_state_layer_ids",)
    taken_over: ClassVar[tuple[str, ...]] = ("mask_token_id",)
    changeable: ClassVar[tuple[str, ...]] = ("block_size", "cut", "threshold")
    decoding: ClassVar[tuple[str, ...]] = ("cut", "threshold")
    speculators_model_type: str = derived("dspark")
    architectures: tuple[str, ...] = derived(("DSparkSpeculator",))
    aux_hidden_state_layer_ids: tuple[int, ...] = derived(())
    target_hidden_size: int | None = derived(None)
    sample_from_anchor: bool = derived(True)
    num_layers: int = knob(5, validator=few)
    block_size: int = attrs.field(default=8, validator=few)
    mask_token_id: int | None = attrs.field(default=None, validator=not_negative)
    sliding_window_non_causal: bool = True
    markov_rank: int = attrs.field(default=256, validator=positive)
    markov_head_type: str = attrs.field(default="vanilla", validator=_markov)
    enable_confidence_head: bool = derived(True)
    confidence_head_with_markov: bool = False
    cut: str | None = attrs.field(default=None, validator=_cut)
    threshold: float = attrs.field(default=0.1, validator=_share)
    max_anchors: int = knob(512, validator=positive)
    gamma: float | None = knob(None, validator=positive)
    confidence_weight: float = knob(1.0, validator=positive)
    loss: dict[str, float] = knob(factory=lambda: {"ce": 0.1, "tv": 0.9}, validator=known_losses)

    def max_drafts(self) -> tuple[int, str]:
        """Returns what a block drafts: a token a slot."""
        return self.block_size, "block_size"
