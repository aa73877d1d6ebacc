"""Plain reference decoder layers in float64 with dense masks, to compare algorithms with."""

from __future__ import annotations

import torch

# float32 against float64; losses are of order 10.
TOLERANCE = 2e-5


def wide_parameters(model) -> dict[str, torch.Tensor]:
    """The parameters in float64, with gradients where they are trained."""
    return {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in model.named_parameters()}


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Norms: x / rms(x) * weight."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def dense_layer(model, p, prefix: str, inputs: torch.Tensor, residual: torch.Tensor, history: list) -> torch.Tensor:
    """One more step of a Llama layer of the tiny verifier's shape (4 heads of 8, 2 with keys), naively.

    Args:
        p: parameters, float64.
        inputs: [n, H] what the attention reads.
        residual: [n, H].
        history: (keys, values) of the steps so far; this step's are appended.

    A query sees the first step's keys up to its own place, and of later steps its own key alone.
    """
    step, n, d = len(history), len(inputs), 8
    positions = torch.arange(n, dtype=torch.float64) + step
    theta = model.config.transformer_layer_config["rope_parameters"]["rope_theta"]
    angle = positions[:, None] * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x):
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    projected = (inputs @ p[f"{prefix}self_attn.{name}_proj.weight"].T for name in ("q", "k", "v"))
    q, k, v = (each.unflatten(-1, (-1, d)) for each in projected)
    history.append((rotate(k), v))
    mask = torch.cat([torch.ones(n, n).tril().bool(), *[torch.eye(n, dtype=torch.bool)] * step], 1)
    keys, values = (torch.cat(held).repeat_interleave(2, 1) for held in zip(*history, strict=True))
    scores = torch.einsum("ihd,jhd->hij", rotate(q), keys) * d**-0.5
    mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values).flatten(1)
    x = residual + mixed @ p[f"{prefix}self_attn.o_proj.weight"].T
    y = norm(x, p[f"{prefix}post_attention_layernorm.weight"])
    gate, up = (y @ p[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (torch.nn.functional.silu(gate) * up) @ p[f"{prefix}mlp.down_proj.weight"].T
