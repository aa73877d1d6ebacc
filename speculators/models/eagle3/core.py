"""EAGLE-3 (arXiv 2503.01840): one decoder layer that reads a token embedding beside the verifier's fused states.

Row i pairs the verifier's state at place i with token x_{i+1} at rotary position i and drafts x_{i+2}; the unroll
(training-time test) feeds the draft's own state back, so that depth k of row i reads x_{i+1+k} at position i + k and
drafts x_{i+2+k}. Live decoding is the same computation, one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from speculators.config import VerifierFacts
from speculators.drafter import Proposal
from speculators.losses import head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.base_components import DecoderLayer, Shape, take_over
from speculators.models.chains import chain_metrics, pick, predicting_rows, proposal_of, query_index
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.nn.attention import unrolled_attention
from speculators.nn.cache import KeysValues, PrefixCache
from speculators.nn.layout import RowLayout, Segment, rows_of
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import Rotary
from speculators.nn.vocab import register_vocab
from speculators.verifier.weights import VerifierHead


@attrs.define(eq=False)
class _Cache:
    """Keys and values of each layer: depth 0 for every row of the row's documents, later depths for the query rows."""

    prefix: list[KeysValues]
    own: list[list[KeysValues]]


@SpeculatorModel.register("eagle3")
class Eagle3DraftModel(SpeculatorModel):
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
        self.draft_vocab_size = config.draft_vocab_size or decoder["vocab_size"]
        self.embed_tokens = nn.Embedding(decoder["vocab_size"], size).requires_grad_(False)
        self.fc = nn.Linear(states * size, size, bias=False)
        self.input_norm = RMSNorm(states * size, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList([RMSNorm(size, eps) for _ in range(states)]) if config.fc_norm else None
        first = DecoderLayer(shape, with_embeddings=True, norm_before_residual=config.norm_before_residual)
        self.layers = nn.ModuleList([first, *(DecoderLayer(shape) for _ in range(1, decoder["num_hidden_layers"]))])
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False).requires_grad_(config.lm_head_trainable)
        register_vocab(self, decoder["vocab_size"], self.draft_vocab_size)
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
        """Unrolls `ttt_steps` depths over a packed row and computes the loss (ALGORITHMS.md section 2).

        Returns:
            The draft's normed states [K, N, H] at the N supervised places, the mean loss over those places summed over
            depths with weight ttt_gamma ** k, and accuracies by depth.
        """
        layout, _kept, (fused, last, tokens, positions) = (
            layout or RowLayout.of(document_ids, loss_mask)
        ).without_padding(hidden_states[0], verifier_last_hidden_states[0], input_ids[0], position_ids[0])
        device = tokens.device
        segments = layout.reaching(2, ttt_steps + 1)
        rows, valid = predicting_rows(layout, ttt_steps)
        index = query_index(layout, segments)[rows].to(device, non_blocking=True)
        rows, valid = rows.to(device, non_blocking=True), valid.to(device, non_blocking=True)
        unroll = self._unroll(fused, tokens, positions, layout, segments, ttt_steps)
        states = torch.stack([depth.index_select(0, at) for depth, at in zip(unroll, index, strict=True)])
        places = layout.places.to(device, non_blocking=True)
        gammas = torch.tensor([ttt_gamma**depth for depth in range(ttt_steps)], device=device)
        weights = gammas[:, None] * valid / max(len(places), 1)
        head = self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"
        # The state at place t - 1 gives the verifier's distribution of place t.
        wanted = last[(places - 1).clamp_min(0)]
        result = head_loss(
            states, self.lm_head.weight, weights, lambda chunk: head.logits(wanted[chunk]), mixture(loss)
        )
        total = result.per_depth.sum()
        return states, total, chain_metrics(total, result.right, rows, valid, layout.size)

    def _unroll(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        layout: RowLayout,
        segments: tuple[Segment, ...],
        depths: int,
    ) -> Iterator[torch.Tensor]:
        """Yields the normed states [R, H] of the query rows at each depth, teacher-forced on `input_ids` [S]."""
        rows = rows_of(segments, input_ids.device)
        cache = _Cache([], [[] for _ in self.layers])
        last = len(input_ids) - 1
        everything = torch.arange(layout.size, device=input_ids.device)
        state = self._fuse(hidden_states)
        for depth in range(depths):
            source = everything if depth == 0 else rows
            tokens = input_ids[(source + 1 + depth).clamp_max(last)]
            attend = self._attend(cache, segments, layout.whole(), depth)
            out = self._step(state, tokens, positions[source] + depth, attend, rows if depth == 0 else None)
            normed = self.norm(out)
            yield normed
            state = normed if self.config.norm_output else out

    def _fuse(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[S, A*H] auxiliary states -> [S, H]."""
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        if self.fc_norm is not None:
            parts = hidden_states.chunk(len(self.fc_norm), dim=-1)
            hidden_states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(hidden_states.to(self.fc.weight.dtype))

    def _step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the decoder once: [S, H] states -> [S, H], or [R, H] where only `rows` are wanted."""
        cos_sin = self.rotary(positions)
        embeddings: torch.Tensor | None = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            # Only the last layer may leave rows out: the one above it needs all of them for its keys.
            wanted = rows if index == len(self.layers) - 1 else None
            state = layer(state, cos_sin, lambda *qkv: attend(index, *qkv), embeddings=embeddings, rows=wanted)  # noqa: B023
            embeddings = None
        return state

    def _attend(
        self, cache: _Cache, segments: tuple[Segment, ...], whole: tuple[Segment, ...], depth: int
    ) -> Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns the attention of one depth, which files its keys in the cache."""

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if depth > 0:
                cache.own[index].append((k, v))
            else:
                cache.prefix.append((k, v))
            covered = segments if depth > 0 or index == len(self.layers) - 1 else whole
            return unrolled_attention(
                q, cache.prefix[index], cache.own[index], covered, scale=self.scale, window=self.window
            )

        return attend

    @torch.no_grad()
    def replay(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> Iterator[torch.Tensor]:
        """Yields for each depth the draft logits [S, D] in float32, teacher-forced on the row's tokens."""
        whole = RowLayout.of(document_ids, torch.zeros_like(document_ids, dtype=torch.bool))
        layout, kept, (fused, tokens, positions) = whole.without_padding(
            hidden_states[0], input_ids[0], position_ids[0]
        )
        segments = layout.whole()
        unroll = self._unroll(fused, tokens, positions, layout, segments, num_speculative_tokens)
        for normed in unroll:
            logits = torch.zeros(whole.size, self.draft_vocab_size, device=input_ids.device)
            logits[kept] = self.lm_head(normed.to(self.lm_head.weight.dtype)).float()
            yield logits

    def draft(self) -> Eagle3Drafter:
        """Returns a drafter that decodes with this model."""
        return Eagle3Drafter(self)


@attrs.define(eq=False)
class _Sequence:
    """State of one decoded sequence: the depth-0 cache, and the last row's state and normed state."""

    cache: PrefixCache
    state: torch.Tensor
    normed: torch.Tensor


class Eagle3Drafter:
    """Drafts chains, round by round, with a cache of the depth-0 keys of all verified places."""

    def __init__(self, model: Eagle3DraftModel) -> None:
        self.model = model
        self.target_layer_ids = tuple(model.config.eagle_aux_hidden_state_layer_ids)
        self.draft_to_target = model.draft_to_target

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> _Sequence:
        """Takes in a prompt: tokens [n + 1], states [n, A*H]."""
        sequence = _Sequence(PrefixCache(), torch.empty(0), torch.empty(0))
        self.advance(sequence, tokens[1:], hidden_states)
        return sequence

    @torch.no_grad()
    def advance(self, state: _Sequence, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Takes in what a round emitted: tokens [m], states [m, A*H] of the places before them."""
        model = self.model
        positions = state.cache.extend(tokens)
        attend = state.cache.attend(scale=model.scale, window=model.window)
        out = model._step(model._fuse(hidden_states), tokens, positions, attend, None)[-1:]
        normed = model.norm(out)
        state.state, state.normed = (normed if model.config.norm_output else out), normed

    @torch.no_grad()
    def propose(
        self, state: _Sequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`; greedy at temperature 0, sampled from softmax(logits / T) otherwise."""
        model, length = self.model, state.cache.length
        cache = _Cache(state.cache.layers, [[] for _ in model.layers])
        segments = (Segment(0, length - 1, length),)
        hidden, normed = state.state, state.normed
        position = torch.tensor([length - 1], device=normed.device)
        picks: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for depth in range(1, num_tokens + 1):
            logits = model.lm_head(normed.to(model.lm_head.weight.dtype))[0].float()
            picks.append(pick(logits, temperature, generator))
            if depth < num_tokens:
                token = self.draft_to_target[picks[-1][0]]
                attend = model._attend(cache, segments, segments, depth)
                out = model._step(hidden, token, position + depth, attend, None)
                normed = model.norm(out)
                hidden = normed if model.config.norm_output else out
        return proposal_of(picks, self.draft_to_target, model.embed_tokens.num_embeddings)
