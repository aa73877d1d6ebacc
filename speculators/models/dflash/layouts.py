"""DFlash in the formats of servers and other trainers.

z-lab's files count the layer that a state leaves; ours the layer that it enters.
"""

from __future__ import annotations

from typing import Any

from speculators.facts import VerifierFacts
from speculators.formats.decoder import FULL, decoder_config, unknown_options
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint, PublishedFormat
from speculators.formats.server_layout import VLLM, ServerLayout, activation_refusals, vllm_draft, vllm_serve
from speculators.formats.upstream import VERIFIER_COPIES, Fields, upstream_format

NAMES = TensorNames(
    (
        *unchanged("layers.", "fc.", "hidden_norm.", "norm.", "lm_head.", "embed_tokens.", "d2t", "t2d"),
        *VERIFIER_COPIES,
    ),
    before=("model.",),
)
# Keys of `dflash_config` that mean no other network, as long as they have these values.
_NEUTRAL = {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "projector_type": "dflash", "causal": False}
_READ = ("mask_token_id", "target_layer_ids", "block_size")


def _zlab_config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    raw, table = source.config, source.config["dflash_config"]
    other = {key: value for key, value in table.items() if key not in _READ and value is not None}
    wrong = [
        f"dflash_config.{key} = {value!r} is not known here" for key, value in other.items() if key not in _NEUTRAL
    ]
    wrong += [
        f"dflash_config.{key} = {value!r} is not known here; only {_NEUTRAL[key]!r} is"
        for key, value in other.items()
        if key in _NEUTRAL and value != _NEUTRAL[key]
    ]
    wrong += unknown_options(raw, "block_size", "dflash_config", "is_causal", "num_target_layers")
    block = raw.get("block_size") or table.get("block_size")
    required = {"block_size": block, **{key: table.get(key) for key in ("mask_token_id", "target_layer_ids")}}
    wrong += [f"lacks {key}" for key, value in required.items() if value is None]
    if wrong:
        raise source.error(*wrong)
    ids = [layer + 1 for layer in table["target_layer_ids"]]
    if facts.num_hidden_layers in ids:
        raise source.error(
            "target_layer_ids contains the last layer: z-lab reads its state after the final norm, we read it before"
        )
    decoder = decoder_config(raw, "qwen3", source, num_states=len(ids))
    # z-lab's sliding layers are causal inside the block unless the file says otherwise; full ones see the whole block.
    causal = raw.get("is_causal")
    return {
        "block_size": block,
        "mask_token_id": table["mask_token_id"],
        "aux_hidden_state_layer_ids": ids,
        "sample_from_anchor": False,
        "sliding_window_non_causal": decoder["layer_types"][0] == FULL if causal is None else not causal,
        "draft_vocab_size": raw["vocab_size"],
        "transformer_layer_config": decoder,
        "speculative_tokens": block - 1,
    }


def _upstream_fields(source: PublishedCheckpoint, fields: Fields) -> Fields:
    if (kind := source.config.get("projector_type", "dflash")) != "dflash":
        raise source.error(f"projector_type = {kind!r} is not known here")
    # In that project the flag only concerns sliding layers: full ones always see the whole block.
    full = fields["transformer_layer_config"]["layer_types"][0] == FULL
    return {**fields, "sliding_window_non_causal": full or bool(source.config.get("sliding_window_non_causal"))}


def _vllm_refuses(config: Any) -> list[str]:
    reasons = activation_refusals(config)
    if config.sample_from_anchor:
        reasons.append(
            "sample_from_anchor: vLLM assumes that the anchor's slot drafts nothing, and shifts the block by one; "
            "train with algorithm.sample_from_anchor = false"
        )
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    if tokens >= config.block_size:
        reasons.append(f"speculative_tokens {tokens}: a block of {config.block_size} drafts {config.block_size - 1}")
    return reasons


SERVER_LAYOUTS = (ServerLayout(server=VLLM, command=vllm_serve, with_k=vllm_draft("dflash"), refusals=_vllm_refuses),)
PUBLISHED_FORMATS = (
    PublishedFormat(
        name="DFlash of z-lab",
        fits=lambda source: "speculators_model_type" not in source.config and "dflash_config" in source.config,
        config=_zlab_config,
        names=NAMES,
    ),
    upstream_format(
        "dflash",
        names=NAMES,
        from_verifier=(),
        layer_ids="aux_hidden_state_layer_ids",
        training=(
            "num_anchors",
            "max_anchors",
            "projector_type",
            "pure_draft_prefix_len",
            "emb_dim",
            "gru_hidden_dim",
            "lambda_base_start",
            "lambda_base_decay_ratio",
            "auf",
        ),
        adapt=_upstream_fields,
    ),
)
