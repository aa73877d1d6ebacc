"""AdamW, or Muon for the matrices and AdamW for the rest; torch's own, sharded or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from speculators.recipe.schema import OptimizerSection

# Rows of these are tokens, so that orthogonalising them means nothing; the names are those of the checkpoint layout.
VOCABULARY_MODULES = {"embed_tokens", "lm_head", "lm_heads"}


class ShardedMuon(torch.optim.Muon):
    """torch's Muon, for whole and for sharded matrices alike.

    The orthogonalisation needs the whole matrix. On a sharded one torch's Muon communicates in each of its bf16
    products (15 all-gathers a matrix), and for tall matrices sums the shards' products in bf16, which is another
    result. So gather the gradient first, once; the update is then computed whole, to the bit as in one process, and
    each process applies its own part. The momentum is kept whole: four bytes a matrix element on each process.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Makes one update; see torch.optim.Muon."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter.grad, DTensor):
                    everywhere = [Replicate()] * parameter.grad.device_mesh.ndim
                    parameter.grad = parameter.grad.redistribute(placements=everywhere)
        return super().step(closure)


class Optimizer:
    """The optimizers of one model, with one learning rate factor.

    Weight decay acts on matrices only: decaying a norm's scale or a bias pulls it to a value that means nothing.
    """

    def __init__(self, model: nn.Module, section: OptimizerSection) -> None:
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

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Returns what is trained, in the model's order."""
        return list(self._names)

    def step(self, factor: float) -> None:
        """Makes one update at `factor` times the peak learning rates, and forgets the gradients."""
        for part, rate in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the state by "parameter.entry"; these are the tensors themselves, to be saved or loaded into."""
        return {
            f"{self._names[parameter]}.{entry}": value
            for part, _ in self._parts
            for parameter, held in part.state.items()
            for entry, value in held.items()
        }

    def prime(self) -> None:
        """Makes the state that torch makes at the first update, so that `tensors` can be loaded into.

        An update at rate 0 with zero gradients; the weights stay as they are.
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
    # 0.2 lr for every shape of matrix, so that lr means what it means for AdamW; "original" would scale with the shape.
    return ShardedMuon(
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
