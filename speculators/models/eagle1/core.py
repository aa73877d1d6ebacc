"""EAGLE (arXiv 2401.15077): a decoder layer that foresees the verifier's next normed state, which its own head reads.

Row i pairs the verifier's normed last state at place i with token x_{i+1}; the draft's state is to be the verifier's
at i + 1, whose distribution is that of x_{i+2}. Further depths feed the draft's state back. HASS (arXiv 2408.15766)
trains those depths, too: queries and keys of later steps come from the draft's states, as when it decodes; and adds,
by option, a cross-entropy of the verifier's most likely tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture, top_k, weighted
from speculators.model import SpeculatorModel
from speculators.models.base_components import DecoderLayer, Shape, run_layers, take_over
from speculators.models.chains import (
    ChainDrafter,
    RecurrentModel,
    chain_metrics,
    copy_norm,
    depth_weights,
    unroll_to_places,
    wanted_states,
)
from speculators.models.eagle1.config import Eagle1SpeculatorConfig
from speculators.nn.cache import AttendAt
from speculators.nn.layout import RowLayout
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import Rotary
from speculators.nn.vocab import register_vocab
from speculators.verifier.weights import VerifierHead


@SpeculatorModel.register("eagle1")
class Eagle1DraftModel(RecurrentModel):
    """The EAGLE draft model.

    Args:
        config: complete, as in config.json.
    """

    not_saved = ("target_head.", "rotary.")

    def __init__(self, config: Eagle1SpeculatorConfig) -> None:
        super().__init__(config)
        decoder = config.transformer_layer_config
        shape = Shape.of(decoder)
        size = shape.hidden_size
        self.vocab_size: int = decoder["vocab_size"]
        self.draft_vocab_size = config.draft_vocab_size or self.vocab_size
        self.embed_tokens = nn.Embedding(self.vocab_size, size).requires_grad_(False)
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.layers = nn.ModuleList([DecoderLayer(shape) for _ in range(decoder["num_hidden_layers"])])
        # The first layer reads what fc gives as it is: published checkpoints have no norm there.
        self.layers[0].input_layernorm = nn.Identity()
        self.verifier_norm = RMSNorm(size, shape.rms_norm_eps).requires_grad_(False)
        self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False).requires_grad_(False)
        register_vocab(self, self.vocab_size, self.draft_vocab_size)
        self.rotary = Rotary(decoder)
        self.target_head: VerifierHead | None = None
        self.scale = shape.head_dim**-0.5
        self.window = decoder.get("sliding_window")

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> Eagle1DraftModel:
        """Builds the model with the verifier's embeddings, norm and head; none if `verifier_name_or_path` is None."""
        ids = (verifier_config.num_hidden_layers,)
        model = cls(Eagle1SpeculatorConfig.pick({**kwargs, "target_layer_ids": ids}))
        if (head := take_over(model, verifier_config, kwargs)) is not None:
            copy_norm(model.verifier_norm, head)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Steps, weights and losses; only training adds noise."""
        names = ("alignment_steps", "alignment_decay", "regression", "loss", "topk", "topk_weight", "noise")
        chosen = {name: kwargs[name] for name in names}
        return chosen, {**chosen, "noise": 0.0}

    def forward(
        self,
        *,
        verifier_last_hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        alignment_steps: int,
        alignment_decay: float,
        regression: float,
        loss: dict[str, float],
        topk: int,
        topk_weight: float,
        noise: float,
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Computes regression + distribution losses (section 3.2; HASS, section 3) of every step over a packed row.

        Returns:
            The draft's states [K, N, H] at the N supervised places, the mean loss over those places summed over steps
            with weight alignment_decay ** k, and metrics: the regression's part, and accuracies by step.
        """
        layout, _kept, (last, tokens, positions) = (layout or RowLayout.of(document_ids, loss_mask)).without_padding(
            verifier_last_hidden_states[0], input_ids[0], position_ids[0]
        )
        state = self.enter(last)
        if noise:
            state = state + noise * (2 * torch.rand_like(state) - 1)
        unrolled = unroll_to_places(self, state, tokens, positions, layout, alignment_steps)
        weights = depth_weights([alignment_decay**step for step in range(alignment_steps)], unrolled.valid)
        head = self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"
        wanted = wanted_states(last, unrolled.places)
        chosen = weighted([(mixture(loss), 1.0), *([(top_k(topk), topk_weight)] if topk else [])])
        result = head_loss(
            unrolled.states, self.lm_head.weight, weights, lambda chunk: head.logits(wanted[chunk]), chosen
        )
        distance = nn.functional.smooth_l1_loss(
            unrolled.states.float(), self.verifier_norm(wanted).float().expand_as(unrolled.states), reduction="none"
        )
        regressed = regression * (weights * distance.mean(-1)).sum()
        total = result.per_depth.sum() + regressed
        metrics = chain_metrics(total, result.right, unrolled.rows, unrolled.valid, layout.size)
        return unrolled.states, total, {**metrics, "regression": regressed.detach()}

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The verifier's last states [S, H], normed."""
        return self.verifier_norm(hidden_states)

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the decoder once; see `RecurrentModel`."""
        read = torch.cat((self.embed_tokens(tokens).to(state.dtype), state), dim=-1)
        return run_layers(
            self.layers, self.fc(read.to(self.fc.weight.dtype)), self.rotary(positions), attend, rows=rows
        )

    def draft(self) -> ChainDrafter:
        """Returns a drafter that decodes with this model."""
        return ChainDrafter(self, self.config.target_layer_ids)
