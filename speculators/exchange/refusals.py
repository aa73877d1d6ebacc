"""Finds options of a speculator that a server would get wrong without an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.facts import VerifierFacts
from speculators.formats.decoder import FULL
from speculators.formats.server_layout import SGLANG, VLLM
from speculators.model import SpeculatorModel
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer, turn_end

# Rotary embeddings that our drafts and the server compute alike.
ROPE_TYPES = {
    VLLM: ("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
    SGLANG: ("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
}


def layer_ids(config: Any) -> tuple[int, ...]:
    """Reads which of the verifier's states a saved config fuses; () if it names none."""
    values = {field.name: getattr(config, field.name) for field in attrs.fields(type(config))}
    ids = [value for name, value in values.items() if name.endswith("layer_ids") and value]
    return tuple(ids[0]) if ids else ()


def config_refusals(config: Any, server: str, facts: VerifierFacts | None) -> list[str]:
    """Lists options of a config that a server ignores or misreads, each with the reason."""
    refusals = _decoder_refusals(config.transformer_layer_config, server)
    ids = layer_ids(config)
    if list(ids) != sorted({*ids}):
        refusals.append(f"layer ids {list(ids)}: servers capture distinct states in ascending order")
    if facts is not None and ids and ids[-1] > facts.num_hidden_layers:
        refusals.append(f"layer ids {list(ids)}: the verifier has {facts.num_hidden_layers} layers")
    if server == SGLANG and facts is not None and facts.num_hidden_layers in ids:
        refusals.append(
            f"layer id {ids[-1]}: SGLang captures what enters a layer, and nothing enters the one after the last"
        )
    return refusals


def _decoder_refusals(decoder: dict[str, Any], server: str) -> list[str]:
    refusals = []
    rope = decoder.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES[server]:
        refusals.append(f"rope_type {kind!r}: {server} knows {', '.join(ROPE_TYPES[server])}")
    if rope and "rope_theta" not in rope:
        refusals.append("rope_parameters lack rope_theta: each program has its own default")
    types = {*decoder.get("layer_types", ())}
    if len(types) > 1:
        refusals.append(
            f"layer_types mixes {', '.join(sorted(types))}: {server} derives one mask for all layers of a draft"
        )
    window = decoder.get("sliding_window")
    if window is not None and FULL in types:
        refusals.append(f"sliding_window {window} with layer_types {FULL}: {server} would attend without the window")
    if server == SGLANG and window is not None:
        refusals.append("sliding_window: SGLang takes a draft's window from its command line, not from config.json")
    if server == SGLANG and rope.get("partial_rotary_factor", 1.0) != 1.0:
        refusals.append("partial_rotary_factor: SGLang's draft layer rotates whole heads")
    return refusals


def undraftable(model: SpeculatorModel, verifier: Path) -> tuple[list[str], list[str]]:
    """Finds stop tokens outside the draft vocabulary; returns refusals and notes.

    Without the token that ends a turn, every answer would end in a rejected round: that is refused. A verifier's files
    often name further stop tokens, with which few answers end. Their absence costs little and is only noted.
    """
    drafted = {*model.draft_to_target.tolist()}
    size = model.config.transformer_layer_config.get("vocab_size", 0)
    absent = {token for token in folder_stop_ids(verifier) if token < size and token not in drafted}
    turn = turn_end(load_tokenizer(verifier))
    refused = [f"token {turn} ends a turn and is not in the draft vocabulary: train with a larger draft_vocab_size"]
    noted = [
        f"token {token}, which may end an answer too, is not in the draft vocabulary: such answers take one more round"
        for token in sorted(absent - {turn})
    ]
    return refused if turn in absent else [], noted


def weight_refusals(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Lists tensors with NaN or infinite values."""
    return [
        f"{name} has values that are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
