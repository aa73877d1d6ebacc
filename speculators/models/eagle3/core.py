"""EAGLE-3 (arXiv 2503.01840): a small decoder that drafts one token after the other from the verifier's own states.

It reads the verifier's states of three layers, fused to one, beside the embedding of the next token. After the first
draft it feeds its own output state back in place of the verifier's, in training (training-time test) as in decoding.

Row i pairs the verifier's state at place i with token x_{i+1} at rotary position i and drafts x_{i+2}; depth k of row i
reads x_{i+1+k} at position i + k and drafts x_{i+2+k}.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from speculators.facts import VerifierFacts
from speculators.losses import acceptance, head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.base_components import (
    Shape,
    at_temperature,
    layers_with_embeddings,
    run_layers,
    same_kwargs,
    take_over,
    target_logits,
)
from speculators.models.chains import ChainDrafter, RecurrentModel, unroll_to_places, weigh_drafts
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.places import chain_metrics, depth_weights, wanted_states
from speculators.nn.cache import AttendAt
from speculators.nn.layout import PackedRow
from speculators.nn.norm import RMSNorm


@SpeculatorModel.register("eagle3")
class Eagle3DraftModel(RecurrentModel):
    """The EAGLE-3 draft model, with the norms of 3.1 as options.

    Args:
        config: complete, as in config.json.
    """

    def __init__(self, config: Eagle3SpeculatorConfig) -> None:
        super().__init__(config)
        shape = Shape.of(config.transformer_layer_config)
        size, eps = shape.hidden_size, shape.rms_norm_eps
        states = len(config.eagle_aux_hidden_state_layer_ids)
        # A published draft may be narrower than its verifier, whose states it then reads at their own width.
        width = config.target_hidden_size or size
        # Parameters are made in this order, since a seed's random numbers are drawn in it.
        self.add_embeddings()
        self.fc = nn.Linear(states * width, size, bias=False)
        # Norms before fc: one over all A states together, or (3.1) one for each.
        self.input_norm = RMSNorm(states * width, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList([RMSNorm(width, eps) for _ in range(states)]) if config.fc_norm else None
        count = config.transformer_layer_config["num_hidden_layers"]
        self.layers = layers_with_embeddings(shape, count, norm_before_residual=config.norm_before_residual)
        self.norm = RMSNorm(size, eps)
        self.add_head(trainable=config.lm_head_trainable)

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> Eagle3DraftModel:
        """Builds the model with the verifier's embeddings and head rows; see `take_over`."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(Eagle3SpeculatorConfig.pick({**kwargs, "eagle_aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs, head_trainable=model.config.lm_head_trainable)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks depths, their weights and the loss; only training drops states."""
        own = ("ttt_steps", "ttt_gamma", "weights", "until_failure", "state_dropout", "target_temperature", "loss")
        chosen, _ = same_kwargs(kwargs, *own)
        return chosen, {**chosen, "state_dropout": 0.0}

    def forward(
        self,
        *,
        hidden_states: torch.Tensor,
        verifier_last_hidden_states: torch.Tensor,
        ttt_steps: int,
        ttt_gamma: float,
        weights: str,
        until_failure: bool,
        state_dropout: float,
        target_temperature: float,
        loss: dict[str, float],
        **batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Unrolls `ttt_steps` depths over a packed row and computes the loss.

        L = sum_k ttt_gamma^k mean_n w_{k,n} l(p_n, q_{k,n}) over the N supervised places. w is 1 unless `weights` or
        `until_failure` make it depend on the drafts (`weigh_drafts`).

        Returns:
            The draft's normed states [K, N, H] at the supervised places, L, and accuracies by depth.
        """
        row = PackedRow.of(**batch)
        entered = self.enter(row.cut(hidden_states))  # [S, H]
        if state_dropout:
            # Not EAGLE's uniform noise: the layer norms these states, so that fc could outgrow noise of any size.
            entered = entered * (torch.rand(len(entered), 1, device=entered.device) >= state_dropout)
        # Only rows from which a depth reaches a supervised place are unrolled, at the same depth for all.
        unrolled = unroll_to_places(self, entered, row.tokens, row.positions, row.layout, ttt_steps)
        by_depth = depth_weights([ttt_gamma**depth for depth in range(ttt_steps)], unrolled.valid)  # [K, N]
        walk = weights == "walk"
        # p of place n comes from the verifier's last state at n - 1, through its own norm and head.
        targets = wanted_states(row.cut(verifier_last_hidden_states), unrolled.places)  # [N, H]
        result = head_loss(
            unrolled.states,
            self.lm_head.weight,
            weigh_drafts(by_depth, unrolled, row.layout, walk=walk, failure=until_failure),
            at_temperature(target_logits(self.target_head, targets), target_temperature),
            mixture(loss),
            measure=acceptance if walk else None,
        )
        total = result.per_depth.sum()
        metrics = chain_metrics(total, result.right, unrolled.rows, unrolled.valid, row.layout.size)
        return unrolled.states, total, metrics

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Fuses the verifier's auxiliary states: [S, A*H] -> [S, H]."""
        # Verifier states vary in scale between layers, so each norm is meant to give fc inputs of one size.
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        if self.fc_norm is not None:
            parts = hidden_states.chunk(len(self.fc_norm), dim=-1)  # A times [S, H]
            hidden_states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(hidden_states.to(self.fc.weight.dtype))

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the decoder once; see `RecurrentModel`. With `norm_output` the next depth reads the normed state."""
        # Only the first layer reads the embeddings: [norm(e); norm(h)], 2H wide.
        embeddings = self.embed_tokens(tokens)
        state = run_layers(self.layers, state, self.rotary(positions), attend, embeddings=embeddings, rows=rows)
        return self.norm(state) if self.config.norm_output else state

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """Norms the state for the head, unless `step` already has."""
        return state if self.config.norm_output else self.norm(state)

    def draft(self) -> ChainDrafter:
        """Makes a drafter that decodes with this model."""
        return ChainDrafter(self, tuple(self.config.eagle_aux_hidden_state_layer_ids))
