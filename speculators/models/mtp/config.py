"""The config of multi-token prediction (FastMTP, arXiv 2509.18362)."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive
from speculators.facts import VerifierFacts

TARGETS = ("verifier", "data")


def _target(_: object, __: attrs.Attribute[str], value: str) -> None:
    if value not in TARGETS:
        raise ValueError(f"must be one of {', '.join(TARGETS)}, got {value!r}")


def _one(_: object, __: attrs.Attribute[int], value: int) -> None:
    if value != 1:
        raise ValueError(f"must be 1: the one layer is used again for every depth; got {value}")


@SpeculatorModelConfig.register("mtp")
@attrs.frozen(kw_only=True, slots=False)
class MtpSpeculatorConfig(SpeculatorModelConfig):
    """What an MTP speculator is, and how it is trained.

    It drafts the whole vocabulary and reads the last state, so a recipe sets neither `draft_vocab_size` (to less than
    the vocabulary) nor `target_layer_ids`.

    Attributes:
        num_nextn_predict_layers: MTP layers, as servers read it.
        native: fine-tune the head that comes with the verifier (`mtp.*` tensors, Qwen3-Next and Qwen3.5), instead of
            training one of the draft decoder's kind from scratch.
        mtp_steps: depths unrolled in training (K of the paper).
        mtp_beta: weight of depth k's loss is mtp_beta ** k, the weights of all depths normalised to 1 (equation 2).
        targets: "verifier" distils the verifier's distributions, "data" predicts the tokens of the data (the paper).
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
    targets: str = knob("verifier", validator=_target)
    loss: dict[str, float] = knob(factory=lambda: {"kl_div": 1.0}, validator=known_losses)

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """Returns the last layer's output."""
        return (num_layers,)

    def misfits(self, facts: VerifierFacts) -> Iterator[tuple[str, str, str]]:
        """Yields a reduced draft vocabulary, beside what no draft can have."""
        yield from super().misfits(facts)
        if self.draft_vocab_size is not None and self.draft_vocab_size < facts.vocab_size:
            message = f"must be the verifier's {facts.vocab_size}, whose own head drafts; got {self.draft_vocab_size}"
            yield "draft_vocab_size", message, "leave it out"
