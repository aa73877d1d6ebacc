"""EAGLE-3's config (arXiv 2503.01840) and its 3.1 options, in the layout that vLLM reads."""

from __future__ import annotations

from typing import ClassVar

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, option, positive
from speculators.structure.validators import one_of, share


@SpeculatorModelConfig.register("eagle3")
@attrs.frozen(kw_only=True, slots=False)
class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    """An EAGLE-3 speculator and its training.

    Attributes:
        target_hidden_size: width of the verifier's states, if the draft is narrower.
        norm_before_residual: the first layer's residual is the normed state instead of the state.
        norm_before_fc: one RMSNorm over the A concatenated states before `fc`.
        fc_norm: an RMSNorm for each of the A states before `fc` (3.1).
        norm_output: the next depth reads the normed state (3.1).
        ttt_steps: depths unrolled in training.
        ttt_gamma: depth k's loss has weight ttt_gamma ** k; the paper's code takes 0.8.
        weights: how drafts are weighted: "depth" by their depth alone, "walk" also by the rounds that their acceptance
            saves on the way through an answer (models/walk.py).
        until_failure: train each row up to and including its own first wrong depth, and nothing behind it (AUF, arXiv
            2607.01893).
        state_dropout: share of the places, drawn at random, whose verifier's states training hides.
        target_temperature: temperature of the verifier's distributions that are learnt; below 1 they are sharper, for
            greedy decoding.
        loss: weight of each loss in the mixture.
        lm_head_trainable: train the head, which starts as the verifier's rows, instead of keeping it frozen.
    """

    must_say: ClassVar[tuple[str, ...]] = ("eagle_aux_hidden_state_layer_ids",)
    speculators_model_type: str = derived("eagle3")
    architectures: tuple[str, ...] = derived(("Eagle3DraftModel",))
    eagle_aux_hidden_state_layer_ids: tuple[int, ...] = derived(())
    target_hidden_size: int | None = derived(None)
    embed_requires_grad: bool = derived(False)
    norm_before_residual: bool = True
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    ttt_steps: int = knob(3, validator=few)
    ttt_gamma: float = knob(1.0, validator=positive)
    weights: str = option("depth", validator=one_of("depth", "walk"))
    until_failure: bool = option(False)
    state_dropout: float = option(0.0, validator=share)
    target_temperature: float = option(1.0, validator=positive)
    loss: dict[str, float] = knob(factory=lambda: {"kl_div": 1.0}, validator=known_losses)
    lm_head_trainable: bool = knob(False)
