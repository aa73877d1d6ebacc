"""The head computes the verifier's logits from the last hidden state, without the verifier."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators.errors import VerifierError
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.weights import TensorReader, load_embeddings, load_head

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# Overrides of the tiny config, and whether the norm multiplies by 1 + w instead of w.
FAMILIES = {
    "llama": ({}, False),
    "llama untied": ({"tie": False}, False),
    "qwen3": ({}, False),
    "gemma": ({}, True),
    "gemma2": ({"final_logit_softcapping": 2.0}, True),
    "gemma3_text": ({}, True),
    "granite": ({"logits_scaling": 7.0, "rms_norm_eps": 1e-2}, False),
    "cohere": ({"logit_scale": 0.3}, False),
    "qwen3_next": ({**LINEAR, **EXPERTS}, True),
    "qwen3_5_text": (LINEAR, True),
}


def make(folder: Path, family: str) -> Path:
    """A tiny verifier whose norm weights are random too: ones would hide the difference between w and 1 + w."""
    overrides, _ = FAMILIES[family]
    make_tiny_verifier(folder, model_type=family.split()[0], **overrides)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if "norm" in name:
            tensors[name] += 0.5 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_logits_equal_the_verifiers_own(tmp_path: Path, family: str):
    """Norm convention, eps, tied or own head, logit scaling and soft-capping: found for every family without a list.

    Tolerance 1e-5 of the largest logit: the same sums in float32, at most in another order.
    """
    engine = Engine(make(tmp_path, family))
    ids = torch.randint(320, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = engine.model(ids[None]).logits[0]
    head = load_head(tmp_path, engine.facts)
    ((_, last),) = engine.capture([ids], ())
    assert (head.logits(last) - own).abs().max() <= 1e-5 * own.abs().max()
    assert head.unit_offset == FAMILIES[family][1]
    engine.check_head(head)


def test_a_head_of_chosen_rows_gives_those_logits(tmp_path: Path, tiny_verifier: Path):
    """Rows of a draft vocabulary are the rows of the whole head, across the blocks that a file is read in."""
    make_tiny_verifier(tmp_path, vocab_size=9000, tie=False)
    rows = torch.tensor([0, 5, 8191, 8192, 8999])
    facts = Engine(tmp_path).facts
    whole, cut = load_head(tmp_path, facts), load_head(tmp_path, facts, rows=rows)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cut.weight, whole.weight[rows])
    assert torch.allclose(cut.logits(hidden), whole.logits(hidden)[:, rows], atol=1e-5)
    with pytest.raises(VerifierError, match="9001"):
        load_head(tmp_path, facts, rows=torch.tensor([3, 9001]))


def test_a_bfloat16_head_is_close_and_answers_in_float32(tiny_verifier: Path):
    """bfloat16 rows keep 8 bits: logits within 2% of the largest one, returned in float32."""
    facts = Engine(tiny_verifier).facts
    exact, rough = load_head(tiny_verifier, facts), load_head(tiny_verifier, facts, dtype=torch.bfloat16)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    difference = (rough.logits(hidden) - exact.logits(hidden)).abs().max()
    assert rough.logits(hidden).dtype == torch.float32
    assert difference < 0.02 * exact.logits(hidden).abs().max()


def test_the_head_is_frozen_and_never_saved(tiny_verifier: Path):
    """A speculator that holds the head neither trains it nor writes it into its checkpoint."""
    head = load_head(tiny_verifier, Engine(tiny_verifier).facts)
    assert not list(head.parameters())
    assert not head.state_dict()
    assert not head.logits(torch.randn(1, 32)).requires_grad


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, lost: str):
    """A file without head, norm or embeddings is an error that names the tensor; nothing is made up."""
    make_tiny_verifier(tmp_path, tie=False)
    facts = Engine(tmp_path).facts
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifierError, match=lost):
        load_embeddings(tmp_path) if "embed" in lost else load_head(tmp_path, facts)
    with pytest.raises(VerifierError, match=lost):
        Engine(tmp_path)


def test_an_architecture_with_another_last_step_is_refused(tmp_path: Path):
    """A final norm with a bias is not guessed at."""
    make_tiny_verifier(tmp_path, model_type="phi")
    with pytest.raises(VerifierError, match="LayerNorm is neither an RMSNorm nor a LayerNorm without bias"):
        load_head(tmp_path, Engine(tmp_path).facts)


def test_a_head_that_misses_a_rule_does_not_pass_the_check(tmp_path: Path):
    """The check against the model's own logits catches a formula that was misread."""
    engine = Engine(make(tmp_path, "granite"))
    head = load_head(tmp_path, engine.facts)
    head.scale = 1.0
    with pytest.raises(VerifierError, match="differ from the model's own"):
        engine.check_head(head)


def test_shards_are_read_through_their_index(tmp_path: Path, tiny_verifier: Path):
    """Sharded files give the same tensors as a single one."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_verifier, folder)
    Engine(tiny_verifier).model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    one, many = TensorReader(tiny_verifier), TensorReader(folder)
    assert one.names() == many.names()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(VerifierError, match="is not the index"):
        TensorReader(folder)


def test_a_truncated_weight_file_is_named(tmp_path: Path, tiny_verifier: Path):
    """A cut safetensors file is an error with its path, from the reader and from the engine."""
    shutil.copytree(tiny_verifier, tmp_path / "v")
    path = tmp_path / "v/model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    for open_it in (TensorReader, Engine):
        with pytest.raises(VerifierError, match=r"tmp.*v"):
            open_it(tmp_path / "v")
