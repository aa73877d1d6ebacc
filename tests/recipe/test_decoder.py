"""The draft inherits the verifier's decoder: RoPE, positions and layer ids, where other projects went wrong."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from speculators.config import CONFIGS, SpeculatorModelConfig, default_layer_ids
from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.nn.rotary import Rotary
from speculators.recipe.decoder import _ACTIVATIONS, _ROPE_OPTIONS, _ROPES, draft_decoder_config, rope_values

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 100,
    "rope_theta": 10000.0,
}


def decoder(changes: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    return draft_decoder_config(VerifierFacts({**BASE, **(changes or {})}), SpeculatorModelConfig(**config))


def refusals(changes: dict[str, Any] | None = None, **config: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        decoder(changes, **config)
    return {problem.path: f"{problem.message} {problem.hint}" for problem in caught.value.problems}


def test_llamas_decoder_is_inherited_whole(llama: VerifierFacts) -> None:
    """Theta, the llama3 scaling with its original length, positions, eps and grouped heads are those of Llama-3.1."""
    assert draft_decoder_config(llama, SpeculatorModelConfig()) == {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "vocab_size": 128256,
        "attention_bias": False,
        "mlp_bias": False,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
    }


def test_qwens_positions_and_theta_are_inherited(qwen: VerifierFacts) -> None:
    """40960 positions and theta 1e6, where a default of 2048 or 1e4 would fail only when served (SpecForge#249)."""
    made = draft_decoder_config(qwen, SpeculatorModelConfig(num_layers=2))
    assert made["max_position_embeddings"] == 40960
    assert made["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000}
    assert made["head_dim"] == 128
    assert made["layer_types"] == ["full_attention"] * 2


def test_a_partial_rotary_factor_beside_the_rotary_parameters_is_inherited() -> None:
    """Older files keep this factor outside; it decides which half of a head is rotated (speculators#613)."""
    assert decoder({"partial_rotary_factor": 0.5})["rope_parameters"]["partial_rotary_factor"] == 0.5
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    assert decoder(inside)["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_longropes_original_length_is_inherited_from_beside_the_rotary_parameters() -> None:
    """Phi-3's files keep it outside; without it, the maximum length would pass for the original one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    made = decoder({"rope_parameters": rope, "original_max_position_embeddings": 128})
    assert made["rope_parameters"] == {**rope, "original_max_position_embeddings": 128}
    assert (
        "original_max_position_embeddings" not in decoder({"original_max_position_embeddings": 128})["rope_parameters"]
    )


def test_of_rotary_parameters_per_layer_type_the_draft_takes_its_own() -> None:
    """If sliding and full layers rotate differently (Gemma 3), the draft takes those of its layer type."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert decoder({"rope_parameters": rope})["rope_parameters"] == rope["full_attention"]
    sliding = decoder({"rope_parameters": rope}, decoder={"sliding_window": 64})
    assert sliding["rope_parameters"] == rope["sliding_attention"]
    assert sliding["layer_types"] == ["sliding_attention"]


def test_a_value_that_the_verifier_lacks_is_asked_for_not_guessed() -> None:
    """No rotary parameters and no eps: two problems that name the file and the key to set."""
    problems = refusals({"rope_theta": None, "rms_norm_eps": None} | {"rope_parameters": None})
    assert set(problems) == {"algorithm.decoder.rope_parameters", "algorithm.decoder.rms_norm_eps"}
    assert "config.json has no 'rms_norm_eps' to inherit" in problems["algorithm.decoder.rms_norm_eps"]
    given = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rms_norm_eps": 1e-6}
    assert decoder({"rope_parameters": None, "rms_norm_eps": None}, decoder=given)["rms_norm_eps"] == 1e-6


def test_the_recipe_may_replace_what_is_inherited() -> None:
    """`algorithm.decoder` wins; a key that does not exist, or that belongs elsewhere, is refused."""
    made = decoder(decoder={"model_type": "qwen3", "intermediate_size": 32})
    assert (made["model_type"], made["intermediate_size"]) == ("qwen3", 32)
    problems = refusals(decoder={"intermediate_sise": 32, "num_hidden_layers": 2, "vocab_size": 5})
    assert "did you mean 'intermediate_size'?" in problems["algorithm.decoder.intermediate_sise"]
    assert "set algorithm.num_layers" in problems["algorithm.decoder.num_hidden_layers"]
    assert "cannot be replaced" in problems["algorithm.decoder.vocab_size"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("sliding_window", -3, "must be > 0, got -3"),
        ("sliding_window", 0, "must be > 0, got 0"),
        ("sliding_window", "a", 'must be an integer, got "a"'),
        ("sliding_window", "none", "must be an integer"),
        ("head_dim", 7, "must be even, got 7"),
        ("num_key_value_heads", 3, "must divide the 4 attention heads, got 3"),
        ("num_attention_heads", 4.0, "must be an integer"),
        ("rms_norm_eps", 0, "must be > 0, got 0"),
        ("attention_bias", "yes", "must be true or false"),
        ("model_type", 3, "must be a string"),
        ("layer_types", ["sliding_attention"], "cannot be replaced set sliding_window"),
        ("rope_parameters", {"rope_type": "default"}, "must have rope_theta, a number > 0, got None"),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "yran"}, "a rope_type of default, linear"),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "yarn"}, "must have factor, which rope_type 'yarn' reads"),
        ("hidden_act", "silo", "did you mean 'silu'?"),
    ],
)
def test_a_value_that_no_decoder_can_have_is_refused(key: str, value: Any, text: str) -> None:
    """Types and bounds of `algorithm.decoder` are checked: with a window of -3, no query would attend to anything."""
    (problem,) = refusals(decoder={key: value}).items()
    assert problem[0] == f"algorithm.decoder.{key}"
    assert text in problem[1]


@pytest.mark.parametrize("key", ["attention_dropout", "initializer_range", "num_experts", "use_cache", "head_dims"])
def test_a_key_that_no_layer_of_a_draft_reads_is_refused(key: str) -> None:
    """Even one from the verifier's config.json: it would be written down and change nothing."""
    (problem,) = refusals({key: 1}, decoder={key: 1}).values()
    assert f"no layer of a draft reads '{key}'" in problem
    assert key != "head_dims" or "did you mean 'head_dim'?" in problem


def test_known_activations_and_rotary_embeddings_are_those_of_transformers() -> None:
    """They are listed so that transformers need not be imported; each can be built."""
    assert set(_ACTIVATIONS) <= set(ACT2FN)
    for kind, keys in _ROPES.items():
        values = {key: [1.0] * 8 if key.endswith("g_factor") or key == "short_factor" else 2.0 for key in keys}
        rope = {"rope_type": kind, "rope_theta": 1e4, **values}
        Rotary(decoder(decoder={"rope_parameters": rope, "head_dim": 16}))


def test_an_impossible_value_of_the_verifier_is_reported_as_inherited() -> None:
    """The recipe did not set it, but may replace it."""
    problems = refusals({"intermediate_size": [64, 64]})
    assert problems == {
        "algorithm.decoder.intermediate_size": "must be an integer, got [64, 64] inherited from config.json"
    }
    assert decoder({"intermediate_size": [64, 64]}, decoder={"intermediate_size": 64})["intermediate_size"] == 64
    assert "inherited" in refusals(decoder={"num_attention_heads": 6})["algorithm.decoder.num_key_value_heads"]


def test_the_number_of_layers_read_is_written_when_it_is_not_three() -> None:
    """For any other number, a server needs `num_aux_hidden_states`."""
    assert "num_aux_hidden_states" not in decoder()
    assert decoder(target_layer_ids=(1, 3, 5, 8))["num_aux_hidden_states"] == 4


def test_all_layers_slide_or_none() -> None:
    """The window decides the type of every layer, whatever mix the verifier has."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 64}
    assert decoder(mixed, num_layers=3)["layer_types"] == ["full_attention"] * 3
    assert decoder(mixed, num_layers=3, decoder={"sliding_window": 8})["layer_types"] == ["sliding_attention"] * 3


@pytest.mark.parametrize("layers", range(1, 81))
def test_default_layer_ids_are_sorted_distinct_and_exist(layers: int) -> None:
    """Also for small verifiers, for which the published rule 2, N//2, N-3 gives duplicates or negative ids."""
    ids = default_layer_ids(layers)
    assert list(ids) == sorted(set(ids))
    assert ids[0] >= 0
    assert ids[-1] <= layers
    assert len(ids) == min(3, layers + 1)
    if layers >= 7:
        assert ids == (2, layers // 2, layers - 3)


def test_smollms_default_layer_ids_are_those_that_a_server_takes() -> None:
    """30 layers: 2, 15, 27, checked against vLLM 0.32."""
    assert default_layer_ids(30) == (2, 15, 27)


@pytest.mark.parametrize("ids", [(), (3, 3), (5, 2), (-1, 2)])
def test_layer_ids_are_sorted_distinct_and_not_negative(ids: tuple[int, ...]) -> None:
    """States are concatenated in the order of ids, so another order is a mistake."""
    configs = [CONFIGS.get(name) for name in CONFIGS.names()]
    chosen = [config for config in configs if "target_layer_ids" in {f.name for f in config.recipe_fields()}]
    assert chosen
    for config in chosen:
        with pytest.raises(ValueError, match="sorted, distinct layer ids"):
            config(target_layer_ids=ids)


MROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}


@pytest.mark.parametrize(
    ("rope", "kept"),
    [
        ({**MROPE, "partial_rotary_factor": 0.25}, {"rope_theta", "rope_type", "partial_rotary_factor"}),
        ({**MROPE, "rope_type": "mrope", "type": "mrope"}, {"rope_theta", "rope_type"}),
        ({**MROPE, "rope_type": "linear", "factor": 2.0, "beta_fast": 32}, {"rope_theta", "rope_type", "factor"}),
    ],
)
def test_rotary_parameters_that_no_layer_reads_are_not_inherited(rope: dict[str, Any], kept: set[str]) -> None:
    """vLLM refuses a draft with `mrope_section` (speculators#570); for text the plain frequencies are the same."""
    made = decoder({"rope_parameters": rope})
    assert set(made["rope_parameters"]) == kept
    assert made["rope_parameters"]["rope_type"] != "mrope"


@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_the_rotary_parameters_that_are_kept_are_those_that_transformers_reads(kind: str) -> None:
    """A list of ours that lags behind transformers would drop a value in silence."""
    source = inspect.getsource(ROPE_INIT_FUNCTIONS[kind])
    read = {*re.findall(r'rope_parameters(?:_dict)?(?:\.get\(|\[)"(\w+)"', source), "rope_type"}
    everything = {key for each in _ROPES for key in (*_ROPES[each], *_ROPE_OPTIONS.get(each, ()))}
    kept = rope_values({**dict.fromkeys(everything | read | {"mrope_section"}, 1.0), "rope_type": kind})
    assert set(kept) == read


def test_a_recipe_cannot_set_rotary_parameters_that_no_layer_reads() -> None:
    """They are refused as any other key that would do nothing."""
    found = refusals(decoder={"rope_parameters": {**MROPE}})
    assert "mrope_interleaved, mrope_section: no layer" in found["algorithm.decoder.rope_parameters"]


LATENT = {"hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512}


def test_a_draft_for_latent_attention_has_few_key_heads() -> None:
    """DeepSeek-V3's 128 heads share one latent; a draft's 128 key heads would each keep keys of their own."""
    made = decoder({**LATENT, "intermediate_size": 18432})
    assert (made["num_attention_heads"], made["num_key_value_heads"], made["head_dim"]) == (56, 8, 128)
    assert made["intermediate_size"] == 18432
    assert decoder(LATENT, decoder={"num_key_value_heads": 4})["num_key_value_heads"] == 4


def test_an_experts_width_is_widened_to_what_a_token_meets() -> None:
    """gpt-oss and MiniMax-M2 write one expert's width as intermediate_size; at most 4 x hidden is taken."""
    experts = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4}
    assert decoder(experts)["intermediate_size"] == 4 * 2880
    assert decoder({**experts, "num_experts_per_tok": 2})["intermediate_size"] == 2 * 2880
    # A width of its own beside the experts' is the dense layers'.
    assert decoder({**experts, "moe_intermediate_size": 720})["intermediate_size"] == 2880
    assert decoder(experts, decoder={"intermediate_size": 1440})["intermediate_size"] == 1440
