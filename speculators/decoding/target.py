"""Runs the verifier for decoding: a KV cache, one forward per drafted chain or tree, hidden states on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from speculators.decoding.cache import Mark, check_continues, is_recurrent, mark, new_cache, rewind
from speculators.drafter import Proposal
from speculators.errors import VerifierError
from speculators.verifier.capture import cache_name, decoder_layers


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
        self._sliding = any("sliding" in kind for kind in model.config.to_dict().get("layer_types") or ())
        self._caught: dict[int, torch.Tensor] = {}
        self._recurrent = is_recurrent(model)
        if self._recurrent:
            check_continues(model)
        self._cache = new_cache(model, recurrent=self._recurrent)
        self._length = 0
        self._scored = torch.empty(0, dtype=torch.int64)
        self._mark: Mark = []

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts a sequence.

        Args:
            tokens: [n] int64: the prompt.

        Returns:
            Logits [V] that follow the prompt, hidden states [n, A*H] of its tokens.
        """
        self._cache = new_cache(self.model, recurrent=self._recurrent)
        self._length = 0
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
        if list(path) == list(range(len(path))):
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

    def _forward(
        self, tokens: torch.Tensor, *, parents: list[int] | None = None, logits_to_keep: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(self._length, self._length + len(tokens), device=self.device)
        mask = None
        if parents is not None:
            positions, mask = self._tree(parents)
        hooks = [self._hook(layer) for layer in set(self.layer_ids)]
        try:
            output = self.model(
                input_ids=tokens[None],
                attention_mask=mask,
                position_ids=positions[None],
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **{cache_name(self.model): self._cache},
            )
        finally:
            for hook in hooks:
                hook.remove()
        # Hooks caught each layer's state of this forward only.
        states = [self._caught.pop(layer)[0] for layer in self.layer_ids]
        return output.logits[0], torch.cat(states, dim=-1) if states else torch.empty(len(tokens), 0)

    def _tree(self, parents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes positions [N + 1] and the additive mask [1, 1, N + 1, length + N + 1]; a node sees its ancestors."""
        if self._sliding or self._recurrent:
            kind = "sliding-window" if self._sliding else "linear-attention"
            raise VerifierError(f"a verifier with {kind} layers cannot score a drafted tree", hint="draft a chain")
        size = len(parents) + 1
        # Node 0 is the scored token, the root; node i + 1 sees itself and what its parent sees.
        sees = torch.eye(size, dtype=torch.bool)
        depth = [0] * size
        for node, parent in enumerate(parents, start=1):
            sees[node] |= sees[parent + 1]
            depth[node] = depth[parent + 1] + 1
        # All nodes see the whole cache; between nodes only ancestors are visible.
        mask = torch.zeros(size, self._length + size, dtype=self.model.dtype)
        mask[:, self._length :].masked_fill_(~sees, torch.finfo(mask.dtype).min)
        positions = self._length + torch.tensor(depth)
        return positions.to(self.device), mask[None, None].to(self.device)

    def _hook(self, layer_id: int) -> torch.utils.hooks.RemovableHandle:
        if layer_id < len(self._layers):
            layer = self._layers[layer_id]
            return layer.register_forward_pre_hook(lambda module, args: self._catch(layer_id, args[0]))
        return self._layers[-1].register_forward_hook(lambda module, args, output: self._catch(layer_id, output))

    def _catch(self, layer_id: int, output: Any) -> None:
        self._caught[layer_id] = output if isinstance(output, torch.Tensor) else output[0]
