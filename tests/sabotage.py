"""Changes of a speculator's folder that a server loads without complaint, and that cost it acceptance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def later_layers(folder: Path) -> str:
    """Reads the state behind each layer instead of the one before it; says what an audit must find."""
    ids: list[int] = []

    def change(config: dict[str, Any]) -> None:
        ids.extend(config["eagle_aux_hidden_state_layer_ids"])
        config["eagle_aux_hidden_state_layer_ids"] = [layer + 1 for layer in ids]

    _edit(folder, change)
    return f"it reads the states of layers {[layer + 1 for layer in ids]} instead of {ids}"


def smaller_theta(folder: Path) -> str:
    """Divides the rotary theta by a hundred; says what an audit must find."""
    thetas: list[float] = []

    def change(config: dict[str, Any]) -> None:
        rope = config["transformer_layer_config"]["rope_parameters"]
        thetas.extend((rope["rope_theta"], rope["rope_theta"] / 100))
        rope["rope_theta"] = thetas[1]

    _edit(folder, change)
    return f"it rotates positions with theta {thetas[1]:g} instead of {thetas[0]:g}"


def permuted_map(folder: Path) -> str:
    """Leaves the draft vocabulary as it is, but for its order; says what an audit must find."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    size = len(tensors["d2t"])
    ids = tensors["d2t"] + torch.arange(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    save_file({**tensors, "d2t": ids[order] - torch.arange(size)}, file)
    return "its drafts are other tokens than the draft means (d2t in another order, or another head)"


SABOTAGES = (later_layers, smaller_theta, permuted_map)


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")
