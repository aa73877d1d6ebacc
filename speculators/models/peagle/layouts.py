"""P-EAGLE in the formats of servers and other trainers."""

from __future__ import annotations

from speculators.formats.names import TensorNames
from speculators.formats.server_layout import VLLM, ServerLayout, vllm_serve
from speculators.formats.upstream import VERIFIER_COPIES, upstream_format

NAMES = TensorNames(
    (
        ("layers.", "layers."),
        ("fc.", "fc."),
        ("input_norm.", "input_norm."),
        ("mask_hidden", "mask_hidden"),
        ("norm.", "norm."),
        ("lm_head.", "lm_head."),
        ("embed_tokens.", "embed_tokens."),
        ("d2t", "d2t"),
        ("t2d", "t2d"),
        *VERIFIER_COPIES,
    )
)

SERVER_LAYOUTS = (ServerLayout(server=VLLM, command=vllm_serve),)
PUBLISHED_FORMATS = (
    upstream_format(
        "peagle",
        names=NAMES,
        from_verifier=("embed_tokens.",),
        layer_ids="eagle_aux_hidden_state_layer_ids",
        training=("enable_sp_ulysses",),
    ),
)
