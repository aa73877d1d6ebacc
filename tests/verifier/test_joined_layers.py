"""Verifiers of a plain structure decode through joined layers; all others through transformers."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from speculators.nn.cache import KeyBuffer
from speculators.verifier.few_rows import few_rows_verifier
from speculators.verifier.tiny import make_tiny_verifier


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_and_states_are_the_models_own(kind: str, tmp_path: Path) -> None:
    """In one forward, and token by token over the buffer; float32 sums in another order differ by 1e-5 of the size."""
    options = {"sliding_window": None} if kind == "mistral" else {}
    model = load(make_tiny_verifier(tmp_path / "v", model_type=kind, **options))
    form = few_rows_verifier(model)
    assert form is not None
    tokens = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
    expected, stream = output.logits[0], output.hidden_states[2][0]
    keys, logits, states = KeyBuffer(), [], []
    for start, stop in ((0, 80), (80, 81), (81, 90)):
        output_of_part = form(tokens[start:stop], torch.arange(start, stop), keys, start=start, layer_ids=(2,))
        logits.append(output_of_part[0])
        states.append(output_of_part[1])
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(torch.cat(states), stream, rtol=1e-4, atol=1e-5 * float(stream.abs().max()))


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "qwen3_moe", "phi3", "gpt_neox"])
def test_another_structure_runs_through_transformers(kind: str, tmp_path: Path) -> None:
    """Layers with further norms, experts, joined weights or other names have no few-row form."""
    assert few_rows_verifier(load(make_tiny_verifier(tmp_path / "v", model_type=kind))) is None


def test_a_model_whose_function_is_another_one_runs_through_transformers(tmp_path: Path) -> None:
    """What has the structure, and computes something else with it, is found by its logits."""
    model = load(make_tiny_verifier(tmp_path / "v", model_type="llama"))
    model.model.layers[1].mlp.act_fn = nn.SiLU()
    assert few_rows_verifier(model) is not None
    handle = model.model.layers[1].register_forward_hook(lambda _, __, out: out * 1.01)
    model.lm_head.weight.mul_(1.0)
    assert few_rows_verifier(model) is None
    handle.remove()


def test_changed_weights_make_a_new_form(tmp_path: Path) -> None:
    """The form is kept with the model until a weight changes."""
    model = load(make_tiny_verifier(tmp_path / "v", model_type="llama"))
    first = few_rows_verifier(model)
    assert few_rows_verifier(model) is first
    model.lm_head.weight.mul_(2.0)
    again = few_rows_verifier(model)
    assert again is not None
    assert again is not first


def test_the_form_goes_when_the_model_goes(tmp_path: Path) -> None:
    """A process that loads many verifiers keeps the weights of none."""
    model = load(make_tiny_verifier(tmp_path / "v", model_type="llama"))
    gone = [weakref.ref(model), weakref.ref(few_rows_verifier(model))]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]
