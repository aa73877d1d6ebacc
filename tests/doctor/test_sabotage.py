"""Faults of the field put into a healthy speculator: each is caught by the check that is there for it, and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from clinic import Clinic, decoder, edit, make_verifier, rope, weights
from safetensors.torch import load_file
from test_algorithms import trained

from speculators.doctor.identity import check_head
from speculators.verifier.engine import Engine

Tamper = Callable[[Path], None]

pytestmark = pytest.mark.slow


@attrs.frozen
class Fault:
    """What is done, which check is to tell, and in which words."""

    tamper: Tamper
    check: str
    words: str
    result: str = "wrong"


def test_the_healthy_run_passes_all(clinic: Clinic) -> None:
    """Nothing is wrong, there is no warning, and every family has checks."""
    examined = clinic.examine(clinic.run / "speculator")
    assert examined.with_result("wrong", "warning") == []
    assert examined.diagnosis.healthy
    checked = {name.partition("/")[0] for name in examined.with_result("ok")}
    assert checked == {"loads", "config", "alignment", "parity", "length", "data"}
    assert float(re.search(r"tau ([\d.]+)", examined["alignment/acceptance"].evidence)[1]) > 3


def test_the_same_speculator_from_elsewhere_passes_what_can_be_known(clinic: Clinic, tmp_path: Path) -> None:
    """Without its run nothing is wrong either; checks that need the run are not made and say why."""
    examined = clinic.examine(clinic.alone(tmp_path))
    assert examined.with_result("wrong", "warning") == []
    assert "not in a run folder" in examined["config/chat template"].evidence
    assert examined["data/loss mask"].result == "not checked"


def at_random(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.randn(256, 32, generator=torch.Generator().manual_seed(1)) / 6


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    one, other = "layers.0.hidden_norm.weight", "layers.0.input_layernorm.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def one_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"][3, 5] = float("nan")


def mapped(ids: torch.Tensor) -> Tamper:
    """Sets the draft vocabulary to these ids, in d2t and t2d."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(320, dtype=torch.bool).index_fill_(0, ids, True)

    return weights(change)


def stale_t2d(tensors: dict[str, torch.Tensor]) -> None:
    tensors["t2d"] = tensors["t2d"].roll(1)


def unsorted(tensors: dict[str, torch.Tensor]) -> None:
    ids = tensors["d2t"] + torch.arange(256)
    ids[[10, 11]] = ids[[11, 10]]
    tensors["d2t"] = ids - torch.arange(256)


def ids_for_offsets(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(256)


def without_end(folder: Path) -> None:
    """Sets a draft vocabulary without <|im_end|> (2), with matching rows of the verifier's head."""
    verifier = Path(json.loads((folder / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"])
    ids = torch.tensor([token for token in range(320) if token != 2][:256])
    mapped(ids)(folder)
    rows = load_file(verifier / "model.safetensors")["model.embed_tokens.weight"][ids]
    weights(lambda tensors: tensors.update({"lm_head.weight": rows}))(folder)


def overwritten(folder: Path) -> None:
    verifier = Path(json.loads((folder / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"])
    rows = load_file(verifier / "model.safetensors")["model.embed_tokens.weight"][:256]
    weights(lambda tensors: tensors.update({"lm_head.weight": rows}))(folder)


def embeddings_of_another(folder: Path) -> None:
    other = make_verifier(folder.parent / "other", seed=9)
    rows = load_file(other / "model.safetensors")["model.embed_tokens.weight"]
    weights(lambda tensors: tensors.update({"embed_tokens.weight": rows}))(folder)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def layers_moved(folder: Path) -> None:
    edit(folder, lambda config: config.update(eagle_aux_hidden_state_layer_ids=[0, 1, 2]))


def layers_outside(folder: Path) -> None:
    edit(folder, lambda config: config.update(eagle_aux_hidden_state_layer_ids=[1, 2, 9]))


def norm_flipped(folder: Path) -> None:
    edit(folder, lambda config: config.update(norm_before_residual=False))


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def layers_unsorted(folder: Path) -> None:
    edit(folder, lambda config: config.update(eagle_aux_hidden_state_layer_ids=[3, 1, 2]))


def of_another_architecture(folder: Path) -> None:
    edit(folder, lambda config: config["speculators_config"]["verifier"].update(architectures=["Qwen3ForCausalLM"]))


def coarse(tensors: dict[str, torch.Tensor]) -> None:
    """Adds one large number to all logits of a row, which float32 can represent and bfloat16 cannot."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 100.0


SABOTAGE = {
    "rope theta times 100": Fault(rope(rope_theta=1e6), "config/rope theta", "rope_theta is 1000000.0.*10000.0"),
    "partial rotary factor": Fault(
        rope(partial_rotary_factor=0.5), "config/partial rotary factor", "partial_rotary_factor is 0.5.*is 1.0"
    ),
    "rope type": Fault(rope(rope_type="linear", factor=4.0), "config/rope type", "rope_type is linear.*is default"),
    "rope scaling": Fault(rope(rope_type="linear", factor=4.0), "config/rope scaling", "'factor': 4.0"),
    "rope theta where nobody reads it": Fault(
        decoder(rope_theta=5e5), "config/rope scaling", "is ignored, since only rope_parameters is read"
    ),
    "max positions": Fault(decoder(max_position_embeddings=64), "config/max positions", "is 64, the verifier's is 256"),
    "norm eps": Fault(decoder(rms_norm_eps=1.0), "config/norm eps", "rms_norm_eps is 1.0"),
    "head size that fits": Fault(
        decoder(head_dim=16, num_attention_heads=2, num_key_value_heads=1), "config/head size", "head_dim is 16"
    ),
    "head size": Fault(decoder(head_dim=16), "loads/shapes", r"q_proj.weight is \[32, 64\].*\[64, 64\]"),
    "hidden size": Fault(decoder(hidden_size=64), "config/sizes", "hidden_size 64, the verifier's is 32"),
    "vocabulary size": Fault(decoder(vocab_size=300), "config/sizes", "vocab_size 300, the verifier's is 320"),
    "layer ids one earlier": Fault(layers_moved, "config/layer ids", r"\[0, 1, 2\], but training read"),
    "layer ids one earlier, by acceptance": Fault(layers_moved, "alignment/layer ids", "one later than .*off by one"),
    "layer ids outside": Fault(layers_outside, "config/layer ids", r"ids 0 to 4, not \[9\]"),
    "layer ids unsorted": Fault(layers_unsorted, "config/layer ids", r"\[3, 1, 2\] are not sorted and distinct"),
    "number of states": Fault(
        decoder(num_aux_hidden_states=5), "config/layer ids", "num_aux_hidden_states is 5, but 3 layers are read"
    ),
    "another architecture": Fault(
        of_another_architecture,
        "config/architecture",
        "is LlamaForCausalLM, config.json says Qwen3ForCausalLM",
    ),
    "more than 16 bits keep": Fault(
        weights(coarse), "parity/16 bits", "rounding costs .* of the accepted drafts", "warning"
    ),
    "stale vocabulary map": Fault(
        mapped(torch.arange(64, 320)),
        "loads/head",
        r"stale.*row \d+ is the verifier's row of token \d+, and the map",
    ),
    "d2t and t2d of two maps": Fault(weights(stale_t2d), "loads/vocabulary map", "d2t and t2d disagree"),
    "map not ascending": Fault(weights(unsorted), "loads/vocabulary map", "not ascending"),
    "ids in d2t": Fault(weights(ids_for_offsets), "loads/vocabulary map", "holds target ids, not offsets"),
    "no end of turn": Fault(without_end, "loads/end of turn", r"<\|im_end\|> \(2\) ends a turn and is not in"),
    "random head": Fault(weights(at_random), "loads/head", "the head is random.*mean cosine"),
    "random head, by acceptance": Fault(weights(at_random), "alignment/acceptance", "near chance"),
    "head overwritten by the verifier's": Fault(overwritten, "loads/head", "overwritten by the verifier's"),
    "embeddings of another verifier": Fault(embeddings_of_another, "loads/embeddings", "of another verifier"),
    "swapped norms": Fault(weights(swapped), "alignment/norms in place", "hidden_norm.*input_layernorm.* are swapped"),
    "norm before residual": Fault(
        norm_flipped, "config/as trained", "norm_before_residual is False, training had True"
    ),
    "norm before residual, by acceptance": Fault(
        norm_flipped, "alignment/options", "trained with norm_before_residual = true, config.json says false"
    ),
    "NaN": Fault(weights(one_nan), "loads/finite", r"NaN or infinite: fc.weight \(1 of"),
    "missing head": Fault(weights(without_head), "loads/tensors", "missing: lm_head.weight .*at random"),
    "unexpected tensor": Fault(
        weights(lambda tensors: tensors.update({"midlayer.norm.weight": torch.ones(32)})),
        "loads/tensors",
        "not used by this algorithm: midlayer.norm.weight",
    ),
    "cut short": Fault(truncated, "loads/files", "damaged"),
    "unknown algorithm": Fault(
        lambda folder: edit(folder, lambda config: config.update(speculators_model_type="eagle9")),
        "loads/config.json",
        "eagle9",
    ),
    "no decoder": Fault(
        lambda folder: edit(folder, lambda config: config.pop("transformer_layer_config")), "config/decoder", "has no"
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_fault_is_caught_and_named(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """In the run's folder the lock knows the values of training."""
    fault = SABOTAGE[name]
    speculator = clinic.copy(tmp_path)
    fault.tamper(speculator)
    examined = clinic.examine(speculator)
    assert examined[fault.check].result == fault.result, examined[fault.check]
    assert re.search(fault.words, examined[fault.check].evidence), examined[fault.check].evidence
    assert examined[fault.check].todo
    assert not examined.diagnosis.healthy
    if fault.check != "loads/files":
        assert examined["loads/as exported"].result == "warning"


FOREIGN = {
    "rope theta times 100": ("config/rope theta", "the weights were trained with the verifier's"),
    "partial rotary factor": ("config/partial rotary factor", ""),
    "rope type": ("config/rope type", ""),
    "max positions": ("config/max positions", "nothing shows that training used this value"),
    "random head": ("loads/head", "the head looks random.*no draft is accepted"),
    "stale vocabulary map": ("loads/head", "stale"),
    "layer ids one earlier": ("alignment/layer ids", "off by one"),
    "embeddings of another verifier": ("loads/embeddings", "of another verifier"),
    "swapped norms": ("alignment/norms in place", "hidden_norm.*input_layernorm.* are swapped"),
    "norm eps": ("config/norm eps", "the weights were trained with the verifier's"),
    "no end of turn": ("loads/end of turn", "ends a turn and is not in the draft vocabulary"),
    "missing head": ("loads/tensors", "missing: lm_head.weight"),
    "layer ids unsorted": ("config/layer ids", "not sorted and distinct"),
    "number of states": ("config/layer ids", "num_aux_hidden_states is 5"),
    "another architecture": ("config/architecture", "config.json says Qwen3ForCausalLM"),
    "norm before residual": ("alignment/options", "trained with norm_before_residual = true, config.json says false"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_without_a_run_acceptance_reveals_the_fault(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """A checkpoint from elsewhere has no lock: the same faults show in acceptance."""
    check, words = FOREIGN[name]
    speculator = clinic.alone(tmp_path)
    SABOTAGE[name].tamper(speculator)
    examined = clinic.examine(speculator)
    assert examined[check].result == "wrong", examined[check]
    assert re.search(words, examined[check].evidence), examined[check].evidence


def tokenizer_of_another(folder: Path) -> None:
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    vocabulary = held["model"]["vocab"]
    one, other = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(held))


def template_of_another(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )


def trained_further(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = 1.01 * tensors["model.norm.weight"]

    weights(change)(folder)


VERIFIERS = {
    "other weights": (trained_further, "config/verifier's weights", "different weights"),
    "other tokenizer": (tokenizer_of_another, "config/tokenizer", "a different tokenizer"),
    "wrong chat template": (template_of_another, "config/chat template", "not the one of training"),
    "wrong chat template, rendered": (template_of_another, "data/rendering", "do not reproduce the training data"),
}


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_changed_verifier_is_wrong(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """Changed weights leave the tokenizer's check ok, and a changed tokenizer leaves the weights' check ok."""
    tamper, check, words = VERIFIERS[name]
    verifier = Path(shutil.copytree(clinic.verifier, tmp_path / "verifier"))
    tamper(verifier)
    examined = clinic.examine(clinic.copy(tmp_path), verifier=verifier)
    assert examined[check].result == "wrong", examined[check]
    assert words in examined[check].evidence
    left = "config/tokenizer" if tamper is trained_further else "config/verifier's weights"
    assert examined[left].result == "ok"


def test_a_head_that_does_not_reproduce_the_verifier_s_logits_is_wrong(clinic: Clinic, tmp_path: Path) -> None:
    """config.json names a soft cap that the model does not apply, so every target would differ."""
    verifier = Path(shutil.copytree(clinic.verifier, tmp_path / "verifier"))
    edit(verifier, lambda config: config.update(final_logit_softcapping=0.5))
    examined = check_head(Engine(verifier, dtype="float32"))
    assert examined.result == "wrong"
    assert "differ from the model's own by" in examined.evidence


def test_a_final_norm_that_is_not_the_verifier_s_is_wrong(clinic: Clinic, tmp_path: Path) -> None:
    """Algorithms with heads on the last state save a copy of the norm."""
    speculator = trained(clinic, "medusa", tmp_path / "speculator", steps=1)
    assert clinic.examine(speculator)["loads/verifier's norm"].result == "ok"
    weights(lambda tensors: tensors.update({"verifier_norm.weight": tensors["verifier_norm.weight"] - 1}))(speculator)
    examined = clinic.examine(speculator)["loads/verifier's norm"]
    assert (examined.result, examined.evidence) == ("wrong", "not the verifier's final norm")


MASKS = {
    "all ones": (lambda mask: b"\1" * len(mask), "the prompt is supervised, too"),
    "all zeros": (lambda mask: b"\0" * len(mask), "nothing is supervised"),
    "shifted": (lambda mask: b"\0" + mask[:-1], None),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_wrong_loss_mask_is_wrong(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """The mask's statistics, the template and the run's recorded hashes each reveal it."""
    change, words = MASKS[name]
    cache = Path(shutil.copytree(clinic.cache, tmp_path / "cache"))
    (file,) = cache.glob("conversations/*/loss_mask.u8")
    file.write_bytes(change(file.read_bytes()))
    examined = clinic.examine(clinic.run / "speculator", cache=cache)
    assert "loss_mask.u8" in examined["data/as prepared"].evidence
    assert examined["data/rendering"].result == "wrong"
    if words is None:
        assert "shifted by one" in examined["data/rendering"].evidence
    else:
        assert examined["data/loss mask"].result == "wrong"
        assert words in examined["data/loss mask"].evidence
