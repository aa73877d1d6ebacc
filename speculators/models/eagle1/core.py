"""EAGLE (arXiv 2401.15077): a decoder layer that predicts the verifier's next state, which the verifier's head reads.

Row i pairs the verifier's normed last state at place i with token x_{i+1}. The draft's state is trained towards the
verifier's at i + 1, which gives the distribution of x_{i+2}; further depths feed the draft's state back. HASS (arXiv
2408.15766) also trains those depths, on states that the draft itself left, and can add a cross-entropy over the
verifier's most likely tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture, top_k, weighted
from speculators.model import SpeculatorModel
from speculators.models.base_components import (
    DecoderLayer,
    Shape,
    run_layers,
    take_over,
    target_logits,
)
from speculators.models.chains import ChainDrafter, RecurrentModel, copy_norm, unroll_to_places
from speculators.models.eagle1.config import Eagle1SpeculatorConfig
from speculators.models.places import chain_metrics, depth_weights, wanted_states
from speculators.nn.cache import AttendAt
from speculators.nn.layout import PackedRow
from speculators.nn.norm import RMSNorm


@SpeculatorModel.register("eagle1")
class Eagle1DraftModel(RecurrentModel):
    """The EAGLE draft model.

    Args:
        config: complete, as in config.json.
    """

    def __init__(self, config: Eagle1SpeculatorConfig) -> None:
        super().__init__(config)
        shape = Shape.of(config.transformer_layer_config)
        size = shape.hidden_size
        self.add_embeddings()
        # fc maps [embedding; state] to the layer's input.
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        count = config.transformer_layer_config["num_hidden_layers"]
        self.layers = nn.ModuleList([DecoderLayer(shape) for _ in range(count)])
        # The first layer reads fc's output without a norm: published checkpoints have none there.
        self.layers[0].input_layernorm = nn.Identity()
        self.verifier_norm = RMSNorm(size, shape.rms_norm_eps).requires_grad_(False)
        self.add_head()

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> Eagle1DraftModel:
        """Builds the model with the verifier's embeddings, final norm and head; see `take_over`."""
        ids = (verifier_config.num_hidden_layers,)
        model = cls(Eagle1SpeculatorConfig.pick({**kwargs, "target_layer_ids": ids}))
        if (head := take_over(model, verifier_config, kwargs)) is not None:
            copy_norm(model.verifier_norm, head)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks steps, weights and losses; only training adds noise."""
        names = ("alignment_steps", "alignment_decay", "regression", "loss", "topk", "topk_weight", "noise")
        chosen = {name: kwargs[name] for name in names}
        return chosen, {**chosen, "noise": 0.0}

    def forward(
        self,
        *,
        verifier_last_hidden_states: torch.Tensor,
        alignment_steps: int,
        alignment_decay: float,
        regression: float,
        loss: dict[str, float],
        topk: int,
        topk_weight: float,
        noise: float,
        **batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Computes regression and distribution losses of every step over a packed row.

        L = sum_k decay^k mean_n [l(p_n, q_{k,n}) + regression * SmoothL1(f_{k,n}, f_n)] over the N supervised places,
        where f are the verifier's normed states and f_k the draft's (EAGLE, section 3.2; HASS, section 3). `topk` adds
        the top-k distillation of HASS to l.

        Returns:
            The draft's states [K, N, H] at the supervised places, L, and metrics: the regression's part, and accuracies
            by step.
        """
        row = PackedRow.of(**batch)
        last = row.cut(verifier_last_hidden_states)  # [S, H]
        state = self.enter(last)  # [S, H]
        if noise:
            # U(-noise, noise) on the verifier's states makes the draft robust to its own errors (section 4).
            state = state + noise * (2 * torch.rand_like(state) - 1)
        unrolled = unroll_to_places(self, state, row.tokens, row.positions, row.layout, alignment_steps)
        weights = depth_weights([alignment_decay**step for step in range(alignment_steps)], unrolled.valid)  # [K, N]
        targets = wanted_states(last, unrolled.places)  # [N, H]
        # The mixture as the recipe weighs it, and HASS's top-k loss beside it.
        chosen = weighted([(mixture(loss), 1.0), *([(top_k(topk), topk_weight)] if topk else [])])
        result = head_loss(
            unrolled.states, self.lm_head.weight, weights, target_logits(self.target_head, targets), chosen
        )
        # Regression on features: the mean over the H components, weighted by place and depth as the other losses.
        distance = nn.functional.smooth_l1_loss(
            unrolled.states.float(), self.verifier_norm(targets).float().expand_as(unrolled.states), reduction="none"
        )
        regressed = regression * (weights * distance.mean(-1)).sum()
        total = result.per_depth.sum() + regressed
        metrics = chain_metrics(total, result.right, unrolled.rows, unrolled.valid, row.layout.size)
        return unrolled.states, total, {**metrics, "regression": regressed.detach()}

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norms the verifier's last states [S, H]."""
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
        read = torch.cat((self.embed_tokens(tokens).to(state.dtype), state), dim=-1)  # [S, 2H]
        return run_layers(
            self.layers, self.fc(read.to(self.fc.weight.dtype)), self.rotary(positions), attend, rows=rows
        )

    def draft(self) -> ChainDrafter:
        """Makes a drafter that decodes with this model."""
        return ChainDrafter(self, self.config.target_layer_ids)
