"""Runs the verifier for decoding: a KV cache, one forward per drafted chain or tree, hidden states on request."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from speculators.decoding.cache import (
    Mark,
    check_continues,
    is_plain,
    is_recurrent,
    mark,
    new_cache,
    rewind,
    windows,
)
from speculators.drafter import Proposal
from speculators.errors import VerifierError
from speculators.nn.cache import KeyBuffer
from speculators.verifier.architecture import decoder_layers
from speculators.verifier.capture import cache_name, watch
from speculators.verifier.factors import factors_for, short_length
from speculators.verifier.few_rows import few_rows_verifier


def tree_fault(model: Any) -> str:
    """Says why this verifier cannot score drafted trees; "" if it can."""
    # Keys of a chunk are forgotten at its end, wherever the window of the cache's layer lies.
    chunked = "chunked_attention" in (getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if is_plain(model) and not chunked:
        return ""
    kind = "chunked-attention" if chunked else "linear-attention" if is_recurrent(model) else "sparse-attention"
    return f"a verifier with {kind} layers cannot score a drafted tree"


class CachedVerifier:
    """Scores drafts for one sequence at a time.

    Plain and speculative decoding both run through this class, so that their speeds can be compared.

    Args:
        model: a transformers causal language model, in evaluation mode.
        layer_ids: the hidden states to return, concatenated in this order: id l is the residual stream entering layer
            l, id N the last layer's output before the final norm. () records nothing and costs nothing.

    Raises:
        VerifierError: a layer id that the model does not have, or running states that it ignores.
    """

    def __init__(self, model: Any, layer_ids: Sequence[int] = ()) -> None:
        self.model = model
        self.layer_ids = tuple(layer_ids)
        self.device = model.device
        self._layers = decoder_layers(model)
        outside = [layer for layer in self.layer_ids if not 0 <= layer <= len(self._layers)]
        if outside:
            raise VerifierError(f"the verifier has no layer id {outside[0]}; its ids are 0 to {len(self._layers)}")
        self._recurrent = is_recurrent(model)
        if self._recurrent:
            check_continues(model)
        self._tree_fault = tree_fault(model)
        self._windows = windows(model)
        self._two_factors = short_length(model) is not None
        # A small verifier on a CPU runs without transformers' cost between its products.
        self._few_rows = few_rows_verifier(model)
        self._start()
        self._length = self._longest = 0
        self._scored = torch.empty(0, dtype=torch.int64)
        self._mark: Mark = []

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor, *, longest: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts a sequence.

        Args:
            tokens: [n] int64: the prompt.
            longest: tokens that prompt and answer may have, which decides longrope's factors; at least the prompt's.

        Returns:
            Logits [V] that follow the prompt, hidden states [n, A*H] of its tokens.
        """
        self._start()
        self._length, self._longest = 0, max(longest, len(tokens))
        logits, states = self._forward(tokens.to(self.device), logits_to_keep=1)
        self._length = len(tokens)
        return logits[0], states

    @torch.inference_mode()
    def score(self, token: int, proposal: Proposal | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the last verified token, which has no key yet, and all drafted nodes; the caller calls `keep` next.

        Returns:
            Logits [N + 1, V] and hidden states [N + 1, A*H]: row 0 of the verified token, row i + 1 of node i.
        """
        self._scored = torch.tensor([token], device=self.device)
        if proposal is None or not len(proposal.tokens):
            return self._forward(self._scored)
        self._scored = torch.cat([self._scored, proposal.tokens.to(self.device)])
        parents = proposal.parents.tolist()
        # A chain needs no mask, and any verifier can score it.
        if parents != list(range(-1, len(parents) - 1)):
            return self._forward(self._scored, parents=parents)
        if self._recurrent:
            self._mark = mark(self._cache)
        return self._forward(self._scored)

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Drops the keys of the nodes that are not on the accepted `path`; the scored token's own key stays."""
        # The scored token itself is always kept: it was verified before.
        kept = 1 + len(path)
        surplus = len(self._scored) - kept
        if self._keys is not None:
            # The next forward writes behind the kept keys.
            if list(path) != list(range(len(path))):
                self._keys.pick(self._length + 1, path)
        elif list(path) == list(range(len(path))):
            if surplus and self._recurrent:
                # A running state has no place to crop at: restore the one before the drafts, and rerun the accepted.
                rewind(self._cache, self._mark)
                self._forward(self._scored[:kept], logits_to_keep=1)
            elif surplus:
                self._cache.crop(-surplus)
        else:
            # A path through a tree is not a prefix of the scored nodes: pick its keys one by one.
            rows = [*range(self._length + 1), *(self._length + 1 + node for node in path)]
            index = torch.tensor(rows, device=self.device)
            for layer in self._cache.layers:
                layer.keys = layer.keys.index_select(-2, index)
                layer.values = layer.values.index_select(-2, index)
        self._length += kept

    def _start(self) -> None:
        """Forgets all keys."""
        self._keys = None if self._few_rows is None else KeyBuffer()
        self._cache = new_cache(self.model)

    def _forward(
        self, tokens: torch.Tensor, *, parents: list[int] | None = None, logits_to_keep: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(self._length, self._length + len(tokens), device=self.device)
        masks: dict[str, torch.Tensor] = {}
        if parents is not None:
            positions, masks = self._tree(parents)
        # Layers of one kind take one mask; transformers' models with several pick theirs by its name.
        mask = next(iter(masks.values()), None)
        if self._few_rows is not None and self._keys is not None:
            return self._few_rows(
                tokens,
                positions,
                self._keys,
                start=self._length,
                layer_ids=self.layer_ids,
                mask=None if mask is None else mask[0, 0],
                logits_to_keep=logits_to_keep,
            )
        caught: dict[int, torch.Tensor] = {}
        kept: int | torch.Tensor = logits_to_keep
        if kept and self.layer_ids:
            # Given a number, layers that share keys compute these tokens alone (Gemma 4), and their states would lack.
            kept = torch.arange(len(tokens) - logits_to_keep, len(tokens), device=self.device)
        hooks = [
            watch(self._layers, layer, functools.partial(caught.__setitem__, layer)) for layer in {*self.layer_ids}
        ]
        try:
            with factors_for(self.model, self._longest) if self._two_factors else nullcontext():
                output = self.model(
                    input_ids=tokens[None],
                    attention_mask=masks if len(masks) > 1 else mask,
                    position_ids=positions[None],
                    use_cache=True,
                    logits_to_keep=kept,
                    **{cache_name(self.model): self._cache},
                )
        finally:
            for hook in hooks:
                hook.remove()
        states = [caught[layer][0] for layer in self.layer_ids]
        return output.logits[0], torch.cat(states, dim=-1) if states else torch.empty(len(tokens), 0)

    def _tree(self, parents: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Makes positions [N + 1] and an additive mask [1, 1, N + 1, length + N + 1] for each kind of layer."""
        if self._tree_fault:
            raise VerifierError(self._tree_fault, hint="draft a chain")
        size = len(parents) + 1
        # Node 0 is the scored token, the root; node i + 1 sees itself and what its parent sees.
        sees = torch.eye(size, dtype=torch.bool)
        depth = [0] * size
        for node, parent in enumerate(parents, start=1):
            sees[node] |= sees[parent + 1]
            depth[node] = depth[parent + 1] + 1
        positions = self._length + torch.tensor(depth)
        # All nodes see the whole cache, and among the nodes only their ancestors; a window counts positions.
        seen = torch.cat([torch.ones(size, self._length, dtype=torch.bool), sees], dim=1)
        distance = positions[:, None] - torch.cat([torch.arange(self._length), positions])
        masks = {}
        for kind, window in self._windows.items():
            mask = torch.zeros(seen.shape, dtype=self.model.dtype)
            hidden = ~seen if window is None else ~seen | (distance >= window)
            masks[kind] = mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)[None, None].to(self.device)
        return positions.to(self.device), masks
