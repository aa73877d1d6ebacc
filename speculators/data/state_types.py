"""The types that states are stored in: floating-point types, and 8 bits with a scale for each token and layer.

Residual streams have channels that are hundreds of times as large as the others (SmolLM2-135M, layer 15: 340 times).
In e4m3 these do not cost the small ones their precision, because it rounds each value relative to that value: by 2.6%
on average (root mean square), in every channel, down to 1/28,672 of the token's largest. Integers of 8 bits with the
same scales round the small channels of that layer by 58%.
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch

from speculators.recipe.input_sections import FP8

STATES, LAST, SCALES = "hidden_states", "last", "scales"
_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max

# Name in the recipe: (torch type, numpy type of the same width, name in a safetensors header). numpy has no bfloat16,
# so bytes are read as integers and viewed as the torch type.
DTYPES: dict[str, tuple[torch.dtype, Any, str]] = {
    "bfloat16": (torch.bfloat16, np.int16, "BF16"),
    "float16": (torch.float16, np.int16, "F16"),
    "float32": (torch.float32, np.int32, "F32"),
    FP8: (_E4M3, np.int8, "F8_E4M3"),
}


@attrs.frozen
class Part:
    """A tensor that is stored of each conversation.

    Attributes:
        name: in the file.
        columns: of its rows, one row a token.
        dtype: its type's name in `DTYPES`.
    """

    name: str
    columns: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * DTYPES[self.dtype][0].itemsize


def stored_parts(*, aux_width: int, width: int, dtype: str) -> tuple[Part, ...]:
    """Lists what is stored of states with A*H and H columns, in the order of `to_stored`."""
    parts = Part(STATES, aux_width, dtype), Part(LAST, width, dtype)
    # In float32, so that each layer's largest value is stored exactly: 4 bytes beside H.
    return (*parts, Part(SCALES, aux_width // width + 1, "float32")) if dtype == FP8 else parts


def to_stored(hidden_states: torch.Tensor, last: torch.Tensor, dtype: str) -> tuple[torch.Tensor, ...]:
    """Rounds states [n, A*H] and [n, H] to the stored type, on their device.

    Returns:
        Their `stored_parts`. In fp8 the scales are not finite where states are not.
    """
    if dtype != FP8:
        kind = DTYPES[dtype][0]
        return hidden_states.to(kind), last.to(kind)
    width = last.shape[1]
    (values, scales), (last_values, last_scales) = _scaled(hidden_states, width), _scaled(last, width)
    return values, last_values, torch.cat([scales, last_scales], 1)


def from_stored(parts: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives hidden_states [n, A*H] and last [n, H] of stored parts.

    Args:
        parts: as `to_stored` made them.
        device: where 8 bits become float32, so that only bytes travel there. Other types stay where they are.
    """
    if len(parts) == 2:
        return parts[0], parts[1]
    values, last, scales = (_moved(part, device) for part in parts)
    return _unscaled(values, scales[:, :-1]), _unscaled(last, scales[:, -1:])


def _scaled(states: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    layers = states.float().view(len(states), states.shape[1] // width, width)  # [n, A, H]
    # At least the smallest normal number: a layer may be zero.
    scales = (layers.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)  # [n, A]
    return (layers / scales[..., None]).to(_E4M3).flatten(1), scales


def _unscaled(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    # The bits of a number in e4m3 are those of 2^-8 times that number in float16, 7 places further to the left. torch
    # has no vector instructions for its own conversion on a CPU, and takes 8 times as long.
    halves = ((values.view(torch.int8).short() << 7) & ~(1 << 14)).view(torch.float16)
    layers = halves.float().view(*scales.shape, values.shape[1] // max(1, scales.shape[1]))
    return (layers * (scales * 2**8)[..., None]).flatten(1)


def _moved(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pinned memory, so that the copy does not wait for the update that is computing.
    pinned = part.pin_memory() if device.type == "cuda" and part.device.type == "cpu" else part
    return pinned.to(device, non_blocking=True)
