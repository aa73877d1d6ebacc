"""DSpark's config (arXiv 2607.05147), in the layout that vLLM reads."""

from __future__ import annotations

from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, option, positive
from speculators.structure.validators import not_negative, one_of


def _share(_: object, __: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"must be above 0 and below 1, got {value!r}")


@SpeculatorModelConfig.register("dspark")
@attrs.frozen(kw_only=True, slots=False)
class DSparkSpeculatorConfig(SpeculatorModelConfig):
    """A DSpark speculator and its training.

    Attributes:
        block_size: slots of a block (B), each of which drafts the token after its own.
        mask_token_id: stands for a token that is not known yet; None takes `init_from`'s, or the vocabulary's last.
        sliding_window_non_causal: all slots of a block see each other; if false, each sees those before it.
        markov_rank: width r of the embedding of the token before, from which each slot's logits get a bias.
        markov_head_type: "vanilla" takes the embedding, "gated" the part that the slot's state lets through, "rnn" a
            recurrent state over the block.
        confidence_head_with_markov: the confidence also reads the embedding.
        cut: where a live block ends: "threshold" before the first slot that is accepted with a lower probability,
            "gain" before the first whose expected token is worth less than its cost; None never cuts.
        threshold: the probability of "threshold". For "gain", the cost of one more drafted token, in tokens decoded
            without drafts; `spec bench` measures it with two K or more, and takes it with `--set`.
        max_anchors: blocks drawn per row in training.
        gamma: of the exponential decay exp(-depth / gamma) of the slots' weights; None takes 7 at 15 drafts.
        until_failure: train each block up to and including its own first wrong draft, and nothing behind it (AUF, arXiv
            2607.01893).
        confidence_weight: weight of the confidence's cross-entropy beside the loss.
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
    markov_head_type: str = attrs.field(default="vanilla", validator=one_of("vanilla", "gated", "rnn"))
    enable_confidence_head: bool = derived(True)
    confidence_head_with_markov: bool = False
    cut: str | None = attrs.field(default=None, validator=attrs.validators.optional(one_of("threshold", "gain")))
    threshold: float = attrs.field(default=0.1, validator=_share)
    max_anchors: int = knob(512, validator=positive)
    gamma: float | None = knob(None, validator=positive)
    until_failure: bool = option(False)
    confidence_weight: float = knob(1.0, validator=positive)
    loss: dict[str, float] = knob(factory=lambda: {"ce": 0.1, "tv": 0.9}, validator=known_losses)

    def max_drafts(self) -> tuple[int, str]:
        """Limits a round to one block: one token per slot."""
        return self.block_size, "block_size"
