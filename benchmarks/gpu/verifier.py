"""A verifier of Llama-3.1-8B's shape with random weights, as a Hugging Face folder that the parts share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.shapes import facts_of
from speculators.verifier.architecture import Skeleton
from speculators.verifier.tiny import TURN_END, TURN_START, make_byte_tokenizer

FIXTURE = "llama-3.1-8b"
SMALL_LAYERS = 4


def random_verifier(setup: PartSetup) -> Path:
    """Writes the folder once, 16 GB in bf16, with the byte-level tokenizer of the tiny verifier."""
    folder = setup.folder / "verifier"
    if folder.exists():
        return folder
    ids = {"bos_token_id": TURN_START, "eos_token_id": TURN_END, "pad_token_id": TURN_END}
    layers = {"num_hidden_layers": SMALL_LAYERS} if setup.small else {}
    facts = facts_of(FIXTURE, small=setup.small, **ids, **layers)
    partial = setup.folder / "verifier.partial"
    partial.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in Skeleton.of(facts).model.state_dict().items()}
    weights = {name: _random(shape, setup.device) for name, shape in shapes.items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(facts.to_dict()), encoding="utf-8")
    (partial / "generation_config.json").write_text(json.dumps({**ids, "do_sample": False}), encoding="utf-8")
    make_byte_tokenizer(facts.vocab_size).save_pretrained(partial)
    partial.rename(folder)
    return folder


def _random(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Draws a matrix on the device, since a CPU takes minutes for 8B numbers; a norm's weight is 1."""
    tensor = torch.ones(shape, device=device, dtype=torch.bfloat16)
    return (tensor if len(shape) < 2 else tensor.normal_(std=0.02)).cpu()
