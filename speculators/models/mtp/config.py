"""The config of multi-token prediction (FastMTP, arXiv 2509.18362)."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive
from speculators.facts import VerifierFacts
from speculators.structure.validators import one_of


def _one(_: object, __: attrs.Attribute[int], value: int) -> None:
    if value != 1:
        raise ValueError(f"must be 1: every depth uses the same layer; got {value}")


@SpeculatorModelConfig.register("mtp")
@attrs.frozen(kw_only=True, slots=False)
class MtpSpeculatorConfig(SpeculatorModelConfig):
    """An MTP speculator and its training.

    It drafts from the whole vocabulary and reads the last layer's state, so recipes can neither reduce
    `draft_vocab_size` nor set `target_layer_ids`.

    Attributes:
        num_nextn_predict_layers: number of MTP layers, under the name that servers read.
        native: fine-tune the head that comes with the verifier (`mtp.*` tensors, Qwen3-Next and Qwen3.5) instead of
            training one of the draft decoder's kind from scratch.
        mtp_steps: depths unrolled in training (K of the paper).
        mtp_beta: depth k's loss has weight mtp_beta ** k, normalised to a sum of 1 over all depths (equation 2).
        targets: "verifier" distils the verifier's distributions; "data" predicts the data's tokens, as in the paper.
        loss: weight of each loss in the mixture.
    """

    speculators_model_type: str = derived("mtp")
    architectures: tuple[str, ...] = derived(("MTPDraftModel",))
    target_layer_ids: tuple[int, ...] | None = derived(None)
    num_nextn_predict_layers: int = derived(1)
    num_layers: int = knob(1, validator=_one)
    native: bool = knob(False)
    mtp_steps: int = knob(3, validator=few)
    mtp_beta: float = knob(0.6, validator=positive)
    targets: str = knob("verifier", validator=one_of("verifier", "data"))
    loss: dict[str, float] = knob(factory=lambda: {"kl_div": 1.0}, validator=known_losses)

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """Reads the last layer's output, whatever the recipe says."""
        return (num_layers,)

    def misfits(self, facts: VerifierFacts) -> Iterator[tuple[str, str, str]]:
        """Also reports a reduced draft vocabulary."""
        yield from super().misfits(facts)
        if self.draft_vocab_size is not None and self.draft_vocab_size < facts.vocab_size:
            message = f"must be the verifier's {facts.vocab_size}: its own head drafts; got {self.draft_vocab_size}"
            yield "draft_vocab_size", message, "leave it out"
