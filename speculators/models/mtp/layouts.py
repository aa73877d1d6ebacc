"""MTP heads in a verifier's own checkpoint, where they are published and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ContractError
from speculators.facts import VerifierFacts
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors
from speculators.formats.server_layout import VLLM, Deployment, ServerLayout, vllm_serve
from speculators.formats.upstream import VERIFIER_COPIES, Fields, shared_fields
from speculators.models.mtp.config import MtpSpeculatorConfig
from speculators.models.mtp.kinds import KINDS, PREFIX, native_decoder
from speculators.recipe.decoder import draft_decoder_config

NAMES = TensorNames(
    (
        *unchanged("mtp_layers.", "embed_tokens.", "lm_head.", "verifier_norm."),
        *VERIFIER_COPIES,
    )
)
_VERIFIERS = ("embed_tokens.", "lm_head.", "verifier_norm.")


def _fields(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    try:
        decoder = native_decoder(draft_decoder_config(facts, MtpSpeculatorConfig()), facts)
    except ContractError as error:
        raise source.error(f"{facts.source}: {error}") from error
    return {
        "target_layer_ids": [facts.num_hidden_layers],
        "draft_vocab_size": facts.vocab_size,
        "transformer_layer_config": decoder,
    }


def _upstream_config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    return {**shared_fields(source, MtpSpeculatorConfig, ()), **_fields(source, facts)}


def _command(deployment: Deployment) -> tuple[str, ...]:
    speculative = {"method": "mtp", "num_speculative_tokens": deployment.num_speculative_tokens}
    return (*vllm_serve(deployment), "--speculative-config", json.dumps(speculative))


def _vllm_refuses(config: Any) -> list[str]:
    kind = config.transformer_layer_config["model_type"]
    if kind in KINDS and KINDS[kind].hybrid:
        return []
    return [f"decoder.model_type {kind!r}: vLLM only runs MTP layers that come with a verifier, in its checkpoint"]


def _vllm_notes(_: Any) -> list[str]:
    return ["each tensor of the head keeps the dtype that it has in the verifier's file"]


def _as_trained(config: Any, facts: VerifierFacts) -> Any:
    """A native head has layers of the verifier's own kind."""
    if not config.native:
        return config
    return attrs.evolve(config, transformer_layer_config=native_decoder(config.transformer_layer_config, facts))


def _stitch(speculator: Path, verifier: Path, into: Path) -> Path:
    # Late, here and below, so that `spec validate` starts without torch.
    from speculators.models.mtp.native import stitch

    return stitch(speculator, verifier, into)


def _extract(source: PublishedCheckpoint) -> Tensors:
    from speculators.models.mtp.native import extract

    return extract(source.folder)


SERVER_LAYOUTS = (
    ServerLayout(
        server=VLLM,
        command=_command,
        refusals=_vllm_refuses,
        notes=_vllm_notes,
        as_trained=_as_trained,
        stitch=_stitch,
    ),
)
PUBLISHED_FORMATS = (
    PublishedFormat(
        name="MTP heads in a verifier's checkpoint (Qwen3-Next, Qwen3.5)",
        fits=lambda source: source.has_tensors(PREFIX) and "speculators_model_type" not in source.config,
        config=_fields,
        names=NAMES,
        from_verifier=_VERIFIERS,
        tensors=_extract,
    ),
    PublishedFormat(
        name="speculators 0.5-0.9, mtp",
        fits=lambda source: source.config.get("speculators_model_type") == "mtp",
        config=_upstream_config,
        names=NAMES,
        from_verifier=_VERIFIERS,
    ),
)
