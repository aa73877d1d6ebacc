"""P-EAGLE in the formats of servers and other trainers."""

from __future__ import annotations

from speculators.formats.names import TensorNames, unchanged
from speculators.formats.server_layout import VLLM, ServerLayout, activation_refusals, vllm_serve
from speculators.formats.upstream import VERIFIER_COPIES, upstream_format

NAMES = TensorNames(
    (
        *unchanged("layers.", "fc.", "input_norm.", "mask_hidden", "norm.", "lm_head.", "embed_tokens.", "d2t", "t2d"),
        *VERIFIER_COPIES,
    )
)

SERVER_LAYOUTS = (ServerLayout(server=VLLM, command=vllm_serve, refusals=activation_refusals),)
PUBLISHED_FORMATS = (
    upstream_format(
        "peagle",
        names=NAMES,
        from_verifier=("embed_tokens.",),
        layer_ids="eagle_aux_hidden_state_layer_ids",
        training=("enable_sp_ulysses",),
    ),
)
