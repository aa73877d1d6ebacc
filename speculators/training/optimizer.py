"""AdamW, or Muon for the matrices and AdamW for the rest: torch's own, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._muon import _adjust_lr

from speculators.nn.precision import compute_dtype
from speculators.recipe.schema import OptimizerSection
from speculators.training.average import AVERAGE, Average

# Rows of these are tokens, so orthogonalising them means nothing; the names are those of the checkpoint layout.
VOCABULARY_MODULES = {"embed_tokens", "lm_head", "lm_heads"}


class WholeMuon(torch.optim.Muon):
    """torch's Muon, except that it updates whole matrices, sharded or not, in the precision that the device supports.

    On a sharded matrix, torch's Muon communicates in each of its bf16 products (15 all-gathers per matrix), and for
    tall matrices it sums the shards' products in bf16, which gives another result. Here the gradient is gathered once;
    every process computes the whole update, with the bits of a single process, and applies its own part. The price is
    a whole momentum on every process: four bytes per matrix element.

    torch's products are always bf16; on a device that emulates them they would cost more than the rest of the update.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Makes one update; see torch.optim.Muon."""
        assert closure is None, "gradients are computed before the step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, _gathered(parameter.grad), group)

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        # Nesterov: look one momentum step ahead.
        ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        direction = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], grad.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_like(direction, parameter), alpha=-rate)


def orthogonal(matrix: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float) -> torch.Tensor:
    """Approximates U V^T of a matrix U S V^T [m, n] by Newton-Schulz iterations (Jordan 2024, Muon).

    The singular values come out between 0.7 and 1.2, which trains as well as 1. In bf16 the bits are those of torch's
    Muon.
    """
    a, b, c = coefficients
    x = matrix.to(compute_dtype(torch.bfloat16, matrix.device))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # [min(m, n), max(m, n)], so that the Gram matrix is the small one
    # The iteration converges only from singular values of at most 1.
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        # x <- a x + (b A + c A^2) x with A = x x^T.
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _gathered(grad: torch.Tensor) -> torch.Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Cuts this process's part out of a tensor that all processes have, in the layout of the parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    # Every process computed the same bits, so this is a replica, and taking a part of it needs no communication.
    mesh = parameter.device_mesh
    replica = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replica.redistribute(placements=parameter.placements)


class Optimizer:
    """The optimizers of one model, driven by one learning rate factor.

    Weight decay acts on matrices only: it would pull a norm's scale or a bias towards a value without meaning.

    Attributes:
        average: of the trained parameters.

    Args:
        ema: decay of the average; None for no average.
    """

    def __init__(self, model: nn.Module, section: OptimizerSection, *, ema: float | None) -> None:
        self._names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        muon = section.name == "muon"
        matrices = [p for p, name in self._names.items() if muon and _is_matrix(model, name, p)]
        rest = [p for p in self._names if not any(p is matrix for matrix in matrices)]
        rate = section.lr if section.adamw_lr is None else section.adamw_lr
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            self._parts.append((_muon(matrices, section), section.lr))
        if rest:
            self._parts.append((_adamw(rest, section, rate), rate))
        self.average = Average(self._names, ema)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The trained parameters, in the model's order."""
        return list(self._names)

    def step(self, factor: float) -> None:
        """Makes one update at `factor` times the peak learning rates, and frees the gradients."""
        for part, rate in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Gives the state by "parameter.entry": the tensors themselves, to be saved or loaded into."""
        state = {
            f"{self._names[parameter]}.{entry}": value
            for part, _ in self._parts
            for parameter, entries in part.state.items()
            for entry, value in entries.items()
        }
        averages = {f"{self._names[p]}.{AVERAGE}": value for p, value in self.average.values.items()}
        return {**state, **averages}

    def prime(self) -> None:
        """Creates the state, which torch creates only at the first update, so that `tensors` can be loaded into.

        It makes an update at rate 0 with zero gradients, which leaves the weights as they are.
        """
        for parameter in self._names:
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)


def _is_matrix(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    owner = name.rpartition(".")[0]
    is_vocabulary = not VOCABULARY_MODULES.isdisjoint(owner.split("."))
    return parameter.ndim == 2 and not is_vocabulary and not isinstance(model.get_submodule(owner), nn.Embedding)


def _muon(parameters: list[torch.Tensor], section: OptimizerSection) -> torch.optim.Optimizer:
    # match_rms_adamw (Liu et al., Muon is Scalable for LLM Training, section 2.2): an update's root mean square is
    # 0.2 lr for every shape of matrix, so lr means the same as for AdamW; "original" would scale with the shape.
    return WholeMuon(
        parameters,
        lr=section.lr,
        weight_decay=section.weight_decay,
        momentum=section.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def _adamw(parameters: list[torch.Tensor], section: OptimizerSection, rate: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=section.betas, fused=True)
