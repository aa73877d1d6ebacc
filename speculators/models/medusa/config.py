"""Medusa's config (arXiv 2401.10774), in the layout that vLLM reads."""

from __future__ import annotations

import attrs

from speculators.config import SpeculatorModelConfig, derived, few, knob, known_losses, positive


@SpeculatorModelConfig.register("medusa")
@attrs.frozen(kw_only=True, slots=False)
class MedusaSpeculatorConfig(SpeculatorModelConfig):
    """A Medusa speculator and its training.

    `num_layers` counts the residual blocks of each head. Recipes cannot set `target_layer_ids`: the heads read the last
    layer's state.

    Attributes:
        num_heads: number of heads, and so the most tokens drafted per round.
        head_decay: head k's loss (from 1) has weight head_decay ** (k - 1); the paper's 0.8 ** k, up to a factor.
        loss: weight of each loss in the mixture; "ce" is the negative log-likelihood of the verifier's greedy token.
    """

    speculators_model_type: str = derived("medusa")
    architectures: tuple[str, ...] = derived(("MedusaModel",))
    target_layer_ids: tuple[int, ...] | None = derived(None)
    # vLLM reads these at the top level of config.json.
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
        """Reads the last layer's output, whatever the recipe says."""
        return (num_layers,)

    def max_drafts(self) -> tuple[int, str]:
        """Limits a round to one token per head."""
        return self.num_heads, "num_heads"
