"""EAGLE-3 (arXiv 2503.01840): one decoder layer that reads a token embedding beside the verifier's fused states.

Row i pairs the verifier's state at place i with token x_{i+1} at rotary position i and drafts x_{i+2}; the unroll
(training-time test) feeds the draft's own state back, so that depth k of row i reads x_{i+1+k} at position i + k and
drafts x_{i+2+k}. Live decoding is the same computation, one row at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.base_components import DecoderLayer, Shape, run_layers, take_over
from speculators.models.chains import (
    ChainDrafter,
    RecurrentModel,
    chain_metrics,
    depth_weights,
    unroll_to_places,
    wanted_states,
)
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.nn.cache import AttendAt
from speculators.nn.layout import RowLayout
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import Rotary
from speculators.nn.vocab import register_vocab
from speculators.verifier.weights import VerifierHead


@SpeculatorModel.register("eagle3")
class Eagle3DraftModel(RecurrentModel):
    """The EAGLE-3 draft model.

    Args:
        config: complete, as in config.json.
    """

    not_saved = ("target_head.", "rotary.")

    def __init__(self, config: Eagle3SpeculatorConfig) -> None:
        super().__init__(config)
        decoder = config.transformer_layer_config
        shape = Shape.of(decoder)
        size, eps = shape.hidden_size, shape.rms_norm_eps
        states = len(config.eagle_aux_hidden_state_layer_ids)
        self.vocab_size: int = decoder["vocab_size"]
        self.draft_vocab_size = config.draft_vocab_size or self.vocab_size
        self.embed_tokens = nn.Embedding(self.vocab_size, size).requires_grad_(False)
        self.fc = nn.Linear(states * size, size, bias=False)
        self.input_norm = RMSNorm(states * size, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList([RMSNorm(size, eps) for _ in range(states)]) if config.fc_norm else None
        first = DecoderLayer(shape, with_embeddings=True, norm_before_residual=config.norm_before_residual)
        self.layers = nn.ModuleList([first, *(DecoderLayer(shape) for _ in range(1, decoder["num_hidden_layers"]))])
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False).requires_grad_(config.lm_head_trainable)
        register_vocab(self, self.vocab_size, self.draft_vocab_size)
        self.rotary = Rotary(decoder)
        self.target_head: VerifierHead | None = None
        self.scale = shape.head_dim**-0.5
        self.window = decoder.get("sliding_window")

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> Eagle3DraftModel:
        """Builds the model with the verifier's embeddings and head rows; none where `verifier_name_or_path` is None."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(Eagle3SpeculatorConfig.pick({**kwargs, "eagle_aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs, head_trainable=model.config.lm_head_trainable)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Depths, their weights and the loss; validation uses the same."""
        names = ("ttt_steps", "ttt_gamma", "loss")
        chosen = {name: kwargs[name] for name in names}
        return chosen, chosen

    def forward(
        self,
        *,
        hidden_states: torch.Tensor,
        verifier_last_hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        ttt_steps: int,
        ttt_gamma: float,
        loss: dict[str, float],
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Unrolls `ttt_steps` depths over a packed row and computes the loss (EAGLE-3, arXiv 2503.01840).

        Returns:
            The draft's normed states [K, N, H] at the N supervised places, the mean loss over those places summed over
            depths with weight ttt_gamma ** k, and accuracies by depth.
        """
        layout, _kept, (fused, last, tokens, positions) = (
            layout or RowLayout.of(document_ids, loss_mask)
        ).without_padding(hidden_states[0], verifier_last_hidden_states[0], input_ids[0], position_ids[0])
        unrolled = unroll_to_places(self, self.enter(fused), tokens, positions, layout, ttt_steps)
        weights = depth_weights([ttt_gamma**depth for depth in range(ttt_steps)], unrolled.valid)
        head = self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"
        wanted = wanted_states(last, unrolled.places)
        result = head_loss(
            unrolled.states, self.lm_head.weight, weights, lambda chunk: head.logits(wanted[chunk]), mixture(loss)
        )
        total = result.per_depth.sum()
        return unrolled.states, total, chain_metrics(total, result.right, unrolled.rows, unrolled.valid, layout.size)

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The verifier's auxiliary states [S, A*H], fused to [S, H]."""
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        if self.fc_norm is not None:
            parts = hidden_states.chunk(len(self.fc_norm), dim=-1)
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
        """Runs the decoder once; see `RecurrentModel`. What it leaves is normed already where `norm_output` says so."""
        embeddings = self.embed_tokens(tokens)
        state = run_layers(self.layers, state, self.rotary(positions), attend, embeddings=embeddings, rows=rows)
        return self.norm(state) if self.config.norm_output else state

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """The normed state."""
        return state if self.config.norm_output else self.norm(state)

    def draft(self) -> ChainDrafter:
        """Returns a drafter that decodes with this model."""
        return ChainDrafter(self, tuple(self.config.eagle_aux_hidden_state_layer_ids))
