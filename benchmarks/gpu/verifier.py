"""A verifier of Llama-3.1-8B's shape with random weights, as a Hugging Face folder that the parts share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.shapes import facts_of
from speculators.verifier.quiet import quiet
from speculators.verifier.tiny import TURN_END, TURN_START, make_byte_tokenizer

FIXTURE = "llama-3.1-8b"
SMALL_LAYERS = 4
# Of one file: several load at once.
SHARD = "4GB"


def random_verifier(setup: PartSetup) -> Path:
    """Writes the folder once, 16 GB in bf16, with the byte-level tokenizer of the tiny verifier."""
    folder = setup.folder / "verifier"
    if folder.exists():
        return folder
    ids = {"bos_token_id": TURN_START, "eos_token_id": TURN_END, "pad_token_id": TURN_END}
    layers = {"num_hidden_layers": SMALL_LAYERS} if setup.small else {}
    facts = facts_of(FIXTURE, small=setup.small, **ids, **layers)
    config = AutoConfig.for_model(**facts.to_dict())
    torch.manual_seed(0)
    # Drawn on the GPU: a CPU takes minutes for as many numbers.
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    partial = setup.folder / "verifier.partial"
    with quiet():
        model.to("cpu").save_pretrained(partial, max_shard_size=SHARD)
    make_byte_tokenizer(facts.vocab_size).save_pretrained(partial)
    partial.rename(folder)
    return folder
