"""DSpark in the formats of servers and other trainers."""

from __future__ import annotations

from typing import Any

from speculators.formats.decoder import FULL
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint
from speculators.formats.server_layout import VLLM, ServerLayout, activation_refusals, vllm_draft, vllm_serve
from speculators.formats.upstream import VERIFIER_COPIES, Fields, upstream_format

NAMES = TensorNames(
    (
        *unchanged(
            "layers.",
            "fc.",
            "hidden_norm.",
            "norm.",
            "markov_head.",
            "confidence_head.",
            "lm_head.",
            "embed_tokens.",
            "d2t",
            "t2d",
        ),
        *VERIFIER_COPIES,
    )
)


def _fields(source: PublishedCheckpoint, fields: Fields) -> Fields:
    wrong = []
    if not source.config.get("enable_confidence_head", True):
        wrong.append("enable_confidence_head is false: a DSpark model here always has a confidence head")
    if source.config.get("markov_rank") == 0:
        wrong.append("markov_rank is 0: a DSpark model here always has a Markov head")
    if wrong:
        raise source.error(*wrong)
    full = fields["transformer_layer_config"]["layer_types"][0] == FULL
    return {**fields, "sliding_window_non_causal": full or bool(source.config.get("sliding_window_non_causal"))}


def _vllm_refuses(config: Any) -> list[str]:
    reasons = activation_refusals(config)
    if config.markov_head_type != "vanilla":
        reasons.append(f'markov_head_type {config.markov_head_type!r}: vLLM has only "vanilla"')
    depths = config.block_size if config.sample_from_anchor else config.block_size - 1
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    if tokens > depths:
        reasons.append(f"speculative_tokens {tokens}: a block of {config.block_size} drafts {depths}")
    return reasons


def _vllm_notes(config: Any) -> list[str]:
    notes = ["vLLM serves DSpark on GPUs only (it needs Triton)"]
    if config.sample_from_anchor:
        notes.append(
            "vLLM releases that do not read sample_from_anchor shift the block by one and accept about one token per "
            "round: compare the server's first acceptance length with the one below"
        )
    if config.cut is not None:
        notes.append("vLLM does not cut blocks by confidence: it drafts K tokens in every round")
    return notes


SERVER_LAYOUTS = (
    ServerLayout(
        server=VLLM, command=vllm_serve, with_k=vllm_draft("dspark"), refusals=_vllm_refuses, notes=_vllm_notes
    ),
)
PUBLISHED_FORMATS = (
    upstream_format(
        "dspark",
        names=NAMES,
        from_verifier=(),
        layer_ids="aux_hidden_state_layer_ids",
        training=(
            "num_anchors",
            "max_anchors",
            "ce_loss_alpha",
            "l1_loss_alpha",
            "confidence_head_alpha",
            "loss_decay_gamma",
        ),
        adapt=_fields,
    ),
)
