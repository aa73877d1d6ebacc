"""The few-row form of a layer computes what the layer does."""

from __future__ import annotations

import pytest
import torch

from speculators.models.base_components import DecoderLayer, Shape, for_few_rows
from speculators.nn.cache import KeyBuffer
from speculators.nn.few_rows import FewRowsLayer, FewRowsLinear, FewRowsNorm
from speculators.nn.norm import RMSNorm
from speculators.nn.precision import has_bf16_products

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
KINDS = {
    "llama": {},
    "with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_norms": True},
    "reads embeddings": {},
    "normed residual": {},
    "half of each head turns": {},
}
# float32 sums in another order; bf16 rounds each of about ten steps to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not has_bf16_products("cpu"), reason="computes float32 instead")
    ),
]


def layer_of(kind: str, dtype: torch.dtype) -> DecoderLayer:
    """A layer whose weights and norms are all random."""
    torch.manual_seed(0)
    shape = Shape(**{**SIZES, "head_norms": False, **KINDS[kind]})
    embeddings = kind in ("reads embeddings", "normed residual")
    layer = DecoderLayer(shape, with_embeddings=embeddings, norm_before_residual=kind == "normed residual")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return layer.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_few_row_layer_is_the_layer(kind: str, rows: int, dtype: torch.dtype) -> None:
    """Joined products, turned heads and sums give the layer's own output; the attention is the caller's."""
    layer = layer_of(kind, dtype)
    state, read = torch.randn(2, rows, 24, dtype=dtype)
    angles = torch.randn(rows, 1, 2 if kind == "half of each head turns" else 4)
    angles = torch.cat((angles, angles), -1)
    cos_sin = angles.cos(), angles.sin()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q + k.repeat_interleave(2, 1) * v.repeat_interleave(2, 1)

    embeddings = read if hasattr(layer, "hidden_norm") else None
    expected = layer(state, cos_sin, attend, embeddings=embeddings)
    joined = FewRowsLayer(layer)(state, cos_sin, attend, embeddings=embeddings)
    assert joined.dtype == dtype
    assert float((joined - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def test_a_copy_for_few_rows_shares_what_it_does_not_lay_out_again() -> None:
    """Nested modules are replaced in the copy alone; tensors without another layout stay the same objects."""
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"proj": linear}), "table": torch.nn.Embedding(3, 4)})
    model["norm"] = RMSNorm(4, 1e-5)
    copy = for_few_rows(model.eval())
    assert type(copy["inner"]["proj"]) is FewRowsLinear
    assert type(copy["norm"]) is FewRowsNorm
    assert copy["table"] is model["table"]
    assert model["inner"]["proj"] is linear
    x = torch.randn(3, 4)
    torch.testing.assert_close(copy["inner"]["proj"](x), linear(x))


def test_a_key_buffer_that_grows_keeps_its_keys() -> None:
    """Keys that were written before the buffer grew are read after it, drafts behind the verified tokens included."""
    buffer, keys = KeyBuffer(), torch.randn(700, 2, 4)
    for start in range(0, 700, 7):
        buffer.extend(torch.zeros(7))
        buffer.write(0, keys[start : start + 7], -keys[start : start + 7], start)
    assert torch.equal(buffer.read(0)[0], keys)
    assert torch.equal(buffer.read(0)[1], -keys)


def test_picked_keys_move_to_the_front() -> None:
    """The keys of an accepted path come to lie behind the verified ones, in every layer."""
    buffer = KeyBuffer()
    keys = torch.arange(6.0).view(6, 1, 1)
    for layer in (0, 1):
        buffer.write(layer, keys + 10 * layer, keys, 0)
    buffer.pick(2, [1, 3])
    buffer.length = 4
    assert buffer.read(1)[0].flatten().tolist() == [10, 11, 13, 15]
    assert buffer.read(0)[1].flatten().tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [1, 6, 80])
def test_attention_over_the_buffer_is_dense_attention(rows: int, window: int | None) -> None:
    """Each query sees the keys up to its own, the last `window` of them, shared by the query heads of its kv head."""
    torch.manual_seed(1)
    total, old = rows + 5, 5
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, 2, 8), torch.randn(total, 2, 8)
    buffer = KeyBuffer()
    attended = []
    for part in (slice(0, old), slice(old, total)):
        buffer.extend(torch.zeros(part.stop - part.start))
        attended.append(buffer.attend_newest(scale=0.3, window=window)(0, q[part], k[part], v[part]))
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", q, wide_k) * 0.3
    distance = torch.arange(total)[:, None] - torch.arange(total)
    hidden = (distance < 0) | (distance >= (window or total))
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), wide_v)
    torch.testing.assert_close(torch.cat(attended), expected, rtol=1e-4, atol=1e-5)


def test_bf16_keeps_its_layout_where_onednn_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without the instructions, as most laptops', oneDNN's product of bf16 would raise."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).to(torch.bfloat16).eval()
    assert for_few_rows(model) is model
    assert type(for_few_rows(model.to(torch.float32))[0]) is FewRowsLinear
