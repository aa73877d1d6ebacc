"""Compares captured states with the verifier's in this process, layer by layer, and names wrong layer ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch

from speculators.verifier.engine import Engine

# Attention is causal, so the first tokens of a conversation have the same states without the rest.
TOKENS = 256
# Two engines in float32 differ by the order of their sums, which grows from layer to layer; in 16 bits by rounding,
# too, and in 8 bits by another 3%. The states of neighbouring layers lie much further apart (SmolLM2-135M: 23%).
TOLERANCES = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2, "fp8": 8e-2}


@attrs.frozen(kw_only=True)
class LayerCheck:
    """One layer's captured states.

    Attributes:
        layer: the id that they were captured as.
        error: mean over tokens of |captured - in process| / |in process|, of the same id.
        nearest: the id of the in-process states that they are nearest to.
        nearest_error: the error to those.
    """

    layer: int
    error: float
    nearest: int
    nearest_error: float

    def problem(self, tolerance: float) -> str:
        """Describes the layer's fault; "" if it has none."""
        if self.nearest != self.layer and self.nearest_error <= tolerance:
            return f"the states of layer {self.layer} match layer {self.nearest}'s"
        if self.error > tolerance:
            return f"the states of layer {self.layer} are {self.error:.2g} off (at most {tolerance:g} is rounding)"
        return ""


@attrs.frozen(kw_only=True)
class StatesCheck:
    """The comparison of a sample.

    Attributes:
        source: where the captured states were.
        dtype: in which the verifier computed here.
        states_dtype: of the captured states.
        conversations, tokens: compared.
        layers: the auxiliary ones, then the last.
    """

    source: str
    dtype: str
    states_dtype: str
    conversations: int
    tokens: int
    layers: tuple[LayerCheck, ...]

    @property
    def tolerance(self) -> float:
        """The error that rounding explains."""
        return TOLERANCES[self.states_dtype]

    @property
    def problems(self) -> tuple[str, ...]:
        """Descriptions of the faults of all layers."""
        return tuple(problem for layer in self.layers if (problem := layer.problem(self.tolerance)))

    @property
    def advice(self) -> str:
        """What to do about the problems, "" if there are none."""
        if not self.problems:
            return ""
        shifted = {layer.nearest - layer.layer for layer in self.layers if layer.nearest_error <= self.tolerance}
        if shifted and shifted != {0}:
            return "the server was started with other layer ids: spec serve-states gives it those of the recipe"
        return "is it the same verifier, with the same weights and dtype? were the states captured from these tokens?"

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {**attrs.asdict(self), "tolerance": self.tolerance, "problems": self.problems, "advice": self.advice}


def compare_states(
    engine: Engine,
    rows: Sequence[torch.Tensor],
    captured: Sequence[tuple[torch.Tensor, torch.Tensor]],
    layer_ids: Sequence[int],
) -> tuple[tuple[LayerCheck, ...], int]:
    """Compares captured states with every layer's.

    Args:
        engine: the verifier.
        rows: token ids [n] of some conversations.
        captured: of each, the states at `layer_ids` [n, A*H] and the last ones [n, H].
        layer_ids: what they were captured as.

    Returns:
        A check for each of `layer_ids` and for the last layer, and the number of tokens that were compared.
    """
    layers, width = engine.num_layers + 1, engine.facts.hidden_size
    ids = [*layer_ids, engine.num_layers]
    errors, tokens = torch.zeros(len(ids), layers, dtype=torch.float64), 0
    for ids_of_row, (chosen, last) in zip(rows, captured, strict=True):
        head = ids_of_row[:TOKENS]
        # One conversation at a time: all layers of it are in memory at once.
        own = (
            engine.capture_layers([head], range(layers), longest=[len(ids_of_row)])[0]
            .float()
            .cpu()
            .view(len(head), layers, width)
        )
        states = torch.cat([chosen, last], -1)[: len(head)].float().cpu().view(len(head), len(ids), width)
        norms = own.norm(dim=-1).clamp_min(1e-30)
        for place in range(len(ids)):
            errors[place] += ((states[:, place, None] - own).norm(dim=-1) / norms).double().sum(0)
        tokens += len(head)
    errors /= max(tokens, 1)
    checks = []
    for layer, row in zip(ids, errors, strict=True):
        nearest = int(row.argmin())
        checks.append(
            LayerCheck(layer=layer, error=float(row[layer]), nearest=nearest, nearest_error=float(row[nearest]))
        )
    return tuple(checks), tokens
