"""P-EAGLE as servers and other trainers write it."""

from __future__ import annotations

from speculators.formats.names import Names
from speculators.formats.served import VLLM, Served, vllm_serve
from speculators.formats.upstream import VERIFIERS_OWN, upstream

NAMES = Names(
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
        *VERIFIERS_OWN,
    )
)

SERVED = (Served(server=VLLM, command=vllm_serve),)
FOREIGN = (
    upstream(
        "peagle",
        names=NAMES,
        from_verifier=("embed_tokens.",),
        layer_ids="eagle_aux_hidden_state_layer_ids",
        training=("enable_sp_ulysses",),
    ),
)
