"""DSpark (arXiv 2607.05147): a drafted block whose tokens depend on each other, cut where acceptance gets unlikely.

One forward gives the states of all slots, as in every block drafter. A Markov head then biases each slot's logits by
the token before it, so that tokens are chosen one after the other at the price of a small matrix product. A confidence
head estimates how likely the verifier is to accept a slot's token if it accepted those before; where that gets too low,
a round can stop drafting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from speculators.drafter import Proposal, chain
from speculators.losses import acceptance, head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.anchored import BlockDrafter, BlockDraftModel, BlockSequence, decay_weights
from speculators.models.base_components import same_kwargs, target_logits
from speculators.models.chains import pick, proposal_of
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.places import drawn_metrics, running_sum
from speculators.nn.layout import PackedRow


class MarkovHead(nn.Module):
    """Biases a slot's logits by the token before it: W2 f(W1[previous]).

    Args:
        kind: of f, with e = W1[previous] and the slot's state h. "vanilla" is e, "gated" is sigmoid(G [h; e]) * e,
            "rnn" a recurrence over the block's slots.
        size: H.
        rank: r, the width of e.
    """

    def __init__(self, kind: str, vocab_size: int, draft_vocab_size: int, size: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(size + rank, rank)
        if kind == "rnn":
            # Gate, candidate and output side by side, from [carried; embedding; state]: as other code lays it out.
            self.joint_proj = nn.Linear(size + 2 * rank, 3 * rank)
        # W2 = 0: the head starts without effect, and the block as the backbone drafts it.
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.zeros_(self.markov_w2.weight)

    def forward(
        self, states: torch.Tensor, previous: torch.Tensor, carried: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Computes the features f of K slots in order; W2, which the caller applies, turns them into biases.

        Args:
            states: [..., K, H].
            previous: [..., K] int64, the token before each.
            carried: [..., r], the recurrence's state after the slot before the first; None at a block's start.

        Returns:
            Features and embeddings, [..., K, r] each, and the recurrence's state after the last slot (None without
            one).
        """
        embedded = self.markov_w1(previous)
        if self.kind == "vanilla":
            return embedded, embedded, None
        states = states.to(embedded.dtype)
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((states, embedded), -1))) * embedded, embedded, None
        carry = torch.zeros_like(embedded[..., 0, :]) if carried is None else carried
        features = []
        for state, token in zip(states.unbind(-2), embedded.unbind(-2), strict=True):
            gate, candidate, out = self.joint_proj(torch.cat((carry, token, state), -1)).chunk(3, -1)
            keep = torch.sigmoid(gate)
            carry = keep * carry + (1 - keep) * torch.tanh(candidate)
            features.append(torch.tanh(out))
        return torch.stack(features, -2), embedded, carry


class ConfidenceHead(nn.Module):
    """Estimates how likely the verifier is to accept a slot's token, as a logit."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Projects [..., size] -> [...] float32."""
        return self.proj(x)[..., 0].float()


@SpeculatorModel.register("dspark")
class DSparkDraftModel(BlockDraftModel):
    """The DSpark draft model.

    Args:
        config: complete, as in config.json.
    """

    # Tensors that any block drafter of the same shape has: training can start from a DFlash checkpoint.
    backbone = ("fc.", "hidden_norm.", "layers.", "norm.")

    config_class = DSparkSpeculatorConfig

    def __init__(self, config: DSparkSpeculatorConfig) -> None:
        super().__init__(config)
        size, rank = config.transformer_layer_config["hidden_size"], config.markov_rank
        self.markov_head = MarkovHead(config.markov_head_type, self.vocab_size, self.draft_vocab_size, size, rank)
        self.confidence_head = ConfidenceHead(size + rank if config.confidence_head_with_markov else size)

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks blocks per row, the weights of slots and the losses, the same for validation."""
        return same_kwargs(kwargs, "max_anchors", "gamma", "until_failure", "confidence_weight", "loss")

    def forward(
        self,
        *,
        hidden_states: torch.Tensor,
        verifier_last_hidden_states: torch.Tensor,
        max_anchors: int,
        gamma: float | None,
        until_failure: bool,
        confidence_weight: float,
        loss: dict[str, float],
        **batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Drafts blocks at drawn anchors of a packed row and computes the loss (section 3).

        L = sum_m w_m [l(p_m, q_m) + confidence_weight * BCE(c_m, alpha_m)], alpha = sum_v min(p, q) without gradient.

        Returns:
            The states [M, H] of the slots that draft a supervised place; L, whose weights w decay with depth and
            average over the supervised places as if all anchors had been drawn; accuracies by depth, and
            "confidence_error", the mean distance of the confidence from the acceptance it predicts.
        """
        row = PackedRow.of(**batch)
        fused, last = row.cut(hidden_states), row.cut(verifier_last_hidden_states)
        drawn = self.draw(row, fused, last, max_anchors=max_anchors)
        # Teacher-forced: the token before each slot is the data's. A round feeds its own drafts instead; see the
        # drafter.
        features, embedded, _ = self.markov_head(drawn.states, drawn.previous)  # [G, K, r] each
        states = drawn.of_drafts(drawn.states)  # [M, H]
        weights = decay_weights(drawn, self.depths, gamma) * drawn.scale
        # logits = lm_head h + W2 f, as one product with both heads side by side: [M, H + r] times [D, H + r]^T.
        inputs = torch.cat((states, drawn.of_drafts(features).to(states.dtype)), 1)
        result = head_loss(
            inputs[None],
            self.markov_head.markov_w2.weight,
            drawn.weigh_until_failure(weights) if until_failure else weights[None],
            target_logits(self.target_head, drawn.target_states),
            mixture(loss),
            frozen=self.lm_head.weight,
            # p and q only exist chunk by chunk: the acceptance that confidence learns is measured in passing.
            measure=acceptance,
        )
        confidence = drawn.of_drafts(self.confidence(drawn.states, embedded))  # [M] logits
        truth, weights = result.measured[0], result.weights[0]
        doubt = nn.functional.binary_cross_entropy_with_logits(confidence, truth, weight=weights, reduction="sum")
        total = result.per_depth.sum() + confidence_weight * doubt
        metrics = drawn_metrics(total, result.right[0], drawn.layout, self.depths, drawn.depth, drawn.place)
        error = (torch.sigmoid(confidence.detach()) - truth).abs().sum() / max(1, len(confidence))
        return states, total, {**metrics, "confidence_error": error}

    def confidence(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Estimates acceptance, as logits [..., K].

        Args:
            states: [..., K, H].
            embedded: [..., K, r], embeddings of the tokens before.
        """
        if self.config.confidence_head_with_markov:
            states = torch.cat((states, embedded.to(states.dtype)), -1)
        return self.confidence_head(states)

    @property
    def cuts(self) -> bool:
        """Whether a live round drafts fewer tokens where confidence is low."""
        return self.config.cut is not None

    def lengths(self, confidence: torch.Tensor) -> torch.Tensor:
        """Counts the slots of a block that are drafted, [...] int64, from their confidence logits [..., K]."""
        # Slot k is reached if all before it are accepted: the product of the confidences up to it.
        reached = torch.sigmoid(confidence).cumprod(-1)
        bar: float = self.config.threshold
        if self.config.cut is None:
            kept = torch.ones_like(reached, dtype=torch.bool)
        elif self.config.cut == "threshold":
            kept = reached >= bar
        else:
            # A round of k drafts emits 1 + sum_{j <= k} reached_j tokens and costs 1 + bar * k. One more draft pays off
            # while it adds tokens per cost at a higher rate than the round has so far.
            count = torch.arange(reached.shape[-1], device=reached.device)
            before = 1 + running_sum(reached) - reached
            kept = reached >= bar * before / (1 + bar * count)
        # Up to the first slot that fails.
        return kept.long().cumprod(-1).sum(-1)

    def depth_logits(self, states: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the draft logits [S, D] of each depth with the row's own tokens before each slot."""
        features, _ = self._own_features(states, tokens)
        for depth in range(states.shape[1]):
            yield self.biased(states[:, depth], features[:, depth])

    @torch.no_grad()
    def replay_lengths(self, **batch: Any) -> torch.Tensor:
        """Counts the tokens that a live round drafts from each row, [S] int64; arguments as of `replay`.

        With `confidence_head_with_markov` this holds for rounds whose drafts are right. Behind a wrong draft, where
        nothing is accepted anyway, a live round may stop elsewhere.
        """
        states = self.replay_states(**batch).to(self.fc.weight.dtype)
        _, embedded = self._own_features(states, batch["input_ids"][0])
        return self.lengths(self.confidence(states, embedded))

    def _own_features(self, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the Markov head on states [S, K, H] with the row's own tokens [S]: features and embeddings [S, K, r]."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        previous = (rows + 1 + torch.arange(states.shape[1], device=tokens.device)).clamp_max(len(tokens) - 1)
        features, embedded, _ = self.markov_head(states, tokens[previous])
        return features, embedded

    def biased(self, states: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Computes the draft logits [R, D] in float32 from states [R, H] and the Markov head's features [R, r]."""
        return self.logits(states) + self.markov_head.markov_w2(features).float()

    def draft(self) -> DSparkDrafter:
        """Makes a drafter that decodes with this model."""
        return DSparkDrafter(self)


class _MarkovBranches:
    """The logits of a block's slots below each node, biased by its token; confidence cuts no tree.

    Args:
        states: [K, H], of the block's slots.
        anchor: [1] int64, the last token.
    """

    def __init__(self, model: DSparkDraftModel, states: torch.Tensor, anchor: torch.Tensor) -> None:
        self._model, self._slots, self._anchor = model, iter(states.split(1)), anchor
        # [M, r], the recurrence's state after each node of the last level; None without one.
        self._carried: torch.Tensor | None = None

    def first(self) -> torch.Tensor:
        """Gives the logits after the last token; see `Branches`."""
        return self._biased(self._anchor)

    def below(self, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Biases the next slot by each node's token; see `Branches`."""
        self._carried = None if self._carried is None else self._carried[parents]
        return self._biased(tokens)

    @torch.no_grad()
    def _biased(self, tokens: torch.Tensor) -> torch.Tensor:
        state = next(self._slots).expand(len(tokens), -1)  # [M, H]
        features, _, self._carried = self._model.markov_head(state[:, None], tokens[:, None], self._carried)
        return self._model.biased(state[:1], features[:, 0])


class DSparkDrafter(BlockDrafter):
    """Drafts chains: the tokens of one block, each chosen after the one before, up to where confidence cuts it."""

    @torch.no_grad()
    def propose(
        self, state: BlockSequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of up to `num_tokens`, at most as many as a block drafts and confidence allows."""
        model = self.model
        states = self.block(state, num_tokens)
        token = state.anchor
        carried: torch.Tensor | None = None
        picks, confidences = [], []
        for slot in states:
            features, embedded, carried = model.markov_head(slot[None], token, carried)
            picks.append(pick(model.biased(slot[None], features)[0], temperature, generator))
            confidences.append(model.confidence(slot[None], embedded))
            # The next slot's bias comes from the token just drafted, as a target id.
            token = self.draft_to_target[picks[-1][0]]
        if not picks:
            return chain(token[:0])
        # The whole block is drafted before it is cut: one transfer to the host instead of one per slot.
        kept = int(model.lengths(torch.cat(confidences)))
        return proposal_of(picks[:kept], self.draft_to_target, model.vocab_size)

    @torch.no_grad()
    def begin_tree(self, state: BlockSequence, num_levels: int) -> _MarkovBranches:
        """Starts a tree over the slots of one block; see `DraftsTrees`."""
        return _MarkovBranches(self.model, self.block(state, num_levels), state.anchor)
