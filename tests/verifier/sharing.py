"""What one of several processes does with a verifier that they hold together."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from speculators.verifier.engine import Engine

LAYER_IDS = (1, 3)
ROWS = [torch.arange(length) * 7 % 300 for length in (3, 40, 11, 25, 8, 17, 30)]
MAX_NEW_TOKENS = 6


def share_of(rank: int) -> list[int]:
    """The rows of a process: none for the first one, and as many as its rank for the others."""
    return list(range(len(ROWS)))[sum(range(rank)) :][:rank]


def local_size(parameter: torch.Tensor) -> int:
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def compute(rank: int, size: int, folders: list[Path], home: Path) -> None:
    """Captures different numbers of rows on each process, then answers on the first one alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home / 'store'}", rank=rank, world_size=size)
    for folder in folders:
        engine = Engine(folder, group=dist.new_group(backend="gloo"))
        layers = engine.model.model.layers
        local_share = sum(map(local_size, layers.parameters())) / sum(each.numel() for each in layers.parameters())
        with engine.together():
            rows = [ROWS[index] for index in share_of(rank)]
            captured = {place: states for place, *states in engine.capture_all(rows, LAYER_IDS, batch_tokens=40)}
        answers: list[list[int]] = []
        with engine.together():
            if rank == 0:
                prompts = [row.tolist() for row in ROWS]
                answers = engine.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=3)
        torch.save((local_share, captured, answers), home / f"{folder.name}-{rank}.pt")
    dist.destroy_process_group()
