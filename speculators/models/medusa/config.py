"""Medusa's config (arXiv 2401.10774), in the layout that vLLM reads."""

from __future__ import annotations

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive


@SpeculatorModelConfig.register("medusa")
@attrs.frozen(kw_only=True, slots=False)
class MedusaSpeculatorConfig(SpeculatorModelConfig):
    """What a Medusa speculator is, and how it is trained.

    `num_layers` is the residual blocks of each head. A recipe has no `target_layer_ids`: the heads read the last state.

    Attributes:
        num_heads: heads, and so the most tokens that are drafted a round.
        head_decay: weight of head k's loss is head_decay ** (k - 1) (the paper's 0.8 ** k, up to a factor).
        loss: weight of each loss in the mixture; "ce" is the likelihood of the verifier's own greedy token.
    """

    speculators_model_type: str = derived("medusa")
    architectures: tuple[str, ...] = derived(("MedusaModel",))
    target_layer_ids: tuple[int, ...] | None = derived(None)
    # What vLLM reads, at the top of config.json.
    model_type: str = derived("medusa")
    hidden_size: int = derived(0)
    vocab_size: int = derived(0)
    truncated_vocab_size: int = derived(0)
    num_hidden_layers: int = derived(1)
    medusa_fc_bias: bool = derived(True)
    num_heads: int = attrs.field(default=5, validator=few)
    head_decay: float = knob(0.8, validator=positive)
    loss: dict[str, float] = knob(factory=lambda: {"ce": 1.0}, validator=known_losses)

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """Returns the last layer's output."""
        return (num_layers,)

    def max_drafts(self) -> tuple[int, str]:
        """Returns the number of heads: each drafts one token."""
        return self.num_heads, "num_heads"
