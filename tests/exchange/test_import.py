"""Published checkpoints are imported to the bit, or refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from foreign_layouts import LAYOUTS, build, midlayer, own, replayed, write
from models.test_mtp import HYBRID, native_names
from safetensors.torch import load_file, save_file

from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.errors import ArtifactError
from speculators.exchange.importing import Verifier, import_checkpoint
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier


def verifier_of(folder: Path) -> Verifier:
    return Verifier(folder=folder, name=str(folder), facts=VerifierFacts.read(folder / "config.json"))


@pytest.fixture
def checkpoint(world, tmp_path) -> Path:
    """An EAGLE-3 checkpoint in SGLang's layout, for tests to spoil."""
    midlayer(world, tmp_path / "theirs")
    return tmp_path / "theirs"


def imported(world, folder: Path, out: Path) -> Path:
    return import_checkpoint(folder, verifier_of(world.folder), out).folder


def spoil_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def spoil_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_checkpoint_has_the_same_bits_and_drafts_the_same(world, layout, tmp_path):
    """Every weight equals that of the other layout, omitted ones come from the verifier, and the logits are equal."""
    written = LAYOUTS[layout](world, tmp_path / "theirs")
    done = import_checkpoint(tmp_path / "theirs", verifier_of(world.folder), tmp_path / "ours")
    assert done.format.startswith(written.format)
    loaded = SpeculatorModel.from_pretrained(done.folder)
    original, imported = own(written.model), own(loaded)
    assert sorted(imported) == sorted(original)
    for name, tensor in original.items():
        assert torch.equal(imported[name].float(), tensor.float()), name
    assert loaded.config.speculators_config.verifier.name_or_path == str(world.folder)
    pairs = zip(
        replayed(world, loaded, written.layer_ids), replayed(world, written.model, written.layer_ids), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)
    assert loaded.draft().target_layer_ids == written.layer_ids


def test_a_native_head_is_taken_out_of_its_verifier(tmp_path):
    """A Qwen3.5 verifier's `mtp.*` tensors become a speculator; nothing else of the checkpoint is read as a draft."""
    folder = make_tiny_verifier(tmp_path / "v", model_type="qwen3_5_text", **HYBRID)
    generator = torch.Generator().manual_seed(3)
    head = {name: torch.randn(shape, generator=generator) for name, shape in native_names("qwen3_5_text").items()}
    save_file(head, folder / "model-mtp.safetensors")
    done = import_checkpoint(folder, verifier_of(folder), tmp_path / "ours")
    tensors = own(SpeculatorModel.from_pretrained(done.folder))
    assert done.algorithm == "mtp"
    assert done.tensors == len(head)
    assert torch.equal(tensors["mtp_layers.0.input_proj.weight"], head["mtp.fc.weight"])
    assert torch.equal(tensors["mtp_layers.0.self_attn.q_norm.weight"], head["mtp.layers.0.self_attn.q_norm.weight"])


def test_missing_layer_ids_are_those_of_the_papers_code(world, checkpoint, tmp_path):
    """Without layer ids, 2, N/2 and N - 3 are read; without rope_theta, the format's 10000. A note says so."""
    folder = make_tiny_verifier(
        tmp_path / "v", num_hidden_layers=8, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    spoil_config(checkpoint, eagle_config=None)
    published = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in published.items() if k != "rope_theta"}))
    done = import_checkpoint(checkpoint, verifier_of(folder), tmp_path / "ours")
    config = SpeculatorModel.from_pretrained(done.folder).config
    assert config.eagle_aux_hidden_state_layer_ids == (2, 4, 5)
    assert config.transformer_layer_config["rope_parameters"]["rope_theta"] == 10000.0
    assert any(note.startswith("rope_parameters is") for note in done.notes)


def test_all_missing_and_unknown_tensors_are_reported_together(world, checkpoint, tmp_path):
    """One error names all tensors, by the checkpoint's names where it has them; nothing is written."""

    def change(tensors):
        del tensors["midlayer.hidden_norm.weight"], tensors["norm.weight"]
        return {**tensors, "midlayer.gate.weight": torch.ones(2), "projector.bias": torch.ones(2)}

    spoil_tensors(checkpoint, change)
    with pytest.raises(ArtifactError) as caught:
        imported(world, checkpoint, tmp_path / "ours")
    for message in (
        "layers.0.hidden_norm.weight is missing",
        "norm.weight is missing",
        "layers.0.gate.weight is unknown",
        "projector.bias is unknown",
    ):
        assert message in str(caught.value)
    assert not (tmp_path / "ours").exists()


SPOILED = {
    "a tensor of another shape": (
        lambda tensors: {**tensors, "fc.weight": torch.ones(32, 64)},
        r"fc\.weight is \[32, 64\], but its config implies \[32, 96\]",
    ),
    "values that are no numbers": (
        lambda tensors: {**tensors, "norm.weight": torch.full((32,), torch.nan)},
        "norm.weight has values that are not finite",
    ),
    "a map of ids instead of offsets": (
        lambda tensors: {**tensors, "d2t": torch.arange(96) + tensors["d2t"]},
        "is it offsets, or ids",
    ),
    "maps of different vocabularies": (
        lambda tensors: {**tensors, "t2d": ~tensors["t2d"]},
        "t2d and d2t describe different vocabularies",
    ),
    "the same layer twice": (
        lambda tensors: {**tensors, "layers.0.mlp.up_proj.weight": torch.ones(64, 32)},
        "are the same tensor",
    ),
    "no head": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        "there is no lm_head.weight",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_checkpoint_that_would_draft_nonsense_is_refused(world, checkpoint, tmp_path, what):
    """A checkpoint that other programs load silently, and whose drafts are never accepted, is an error here."""
    change, message = SPOILED[what]
    spoil_tensors(checkpoint, change)
    with pytest.raises(ArtifactError, match=message):
        imported(world, checkpoint, tmp_path / "ours")


REFUSED = {
    "mixed attention": ({"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}, "mixes"),
    "one state": (
        {"eagle_config": {"use_aux_hidden_state": False}},
        "eagle_config.use_aux_hidden_state = False is not known here; only True is",
    ),
    "a layer beyond": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 4]}}, "ascending ids in 0..4"),
    "another verifier": ({"vocab_size": 300}, "its vocab_size is 300, but the verifier .* has 320"),
    "no sizes": ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_config_that_cannot_be_taken_over_is_refused(world, checkpoint, tmp_path, what):
    """The error names the file and each problem."""
    values, message = REFUSED[what]
    spoil_config(checkpoint, **values)
    with pytest.raises(ArtifactError, match=message):
        imported(world, checkpoint, tmp_path / "ours")


@pytest.mark.parametrize(
    ("layout", "values", "message"),
    [
        ("upstream peagle", {"fc_norm": True}, "fc_norm = True: vLLM ignores it"),
        ("upstream peagle", {"scale": 2}, "scale = 2 is unknown"),
        ("upstream peagle", {"shift": False}, "shift = False is unknown; remove it from config.json if"),
        ("upstream dflash", {"projector_type": "domino"}, "domino"),
        ("upstream dspark", {"enable_confidence_head": False}, "confidence head"),
        ("z-lab dflash", {"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0, 3]}}, "after the final norm"),
        ("z-lab dflash", {"dflash_config": {"selector_rank": 8}}, "selector_rank = 8 is not known here"),
        ("vllm medusa", {"logit_scale": 0.5}, "logit_scale"),
        ("vllm medusa", {"shared_blocks": 2}, "shared_blocks = 2 is unknown"),
        ("sglang eagle3", {"residual_scale": 0.5}, "residual_scale = 0.5 is unknown"),
        ("sglang eagle3", {"gated": False}, "gated = False is unknown; remove it from config.json if"),
        ("sglang eagle3", {"bias": True}, "bias = True is not known here; only False is"),
        ("sglang eagle3", {"quantization_config": {"bits": 8}}, "quantization_config = .* is unknown"),
        ("nvidia eagle3", {"eagle_config": {"use_mtp_layernorm": True}}, "eagle_config.use_mtp_layernorm = True"),
        ("nvidia eagle3", {"eagle_config": {"parallel_draft_step": 4}}, "eagle_config.parallel_draft_step = 4"),
        ("nvidia eagle3", {"eagle_config": {"use_gate": 1}}, "eagle_config.use_gate = 1 is unknown"),
        ("safeailab eagle1", {"norm_output": True}, "norm_output = True is unknown"),
        ("z-lab dflash", {"attention_sink_bias": True}, "attention_sink_bias = True is unknown"),
        ("upstream dflash", {"target_hidden_size": 64}, "target_hidden_size"),
    ],
)
def test_an_option_that_is_not_known_is_refused(world, tmp_path, layout, values, message):
    """Served without it, the model would be another one; even an option that is off here may be on by default
    elsewhere."""
    LAYOUTS[layout](world, tmp_path / "theirs")
    spoil_config(tmp_path / "theirs", **values)
    with pytest.raises(ArtifactError, match=message):
        imported(world, tmp_path / "theirs", tmp_path / "ours")


def test_options_that_other_trainers_write_as_off_are_ignored(world, tmp_path):
    """Upstream's P-EAGLE has the options of its EAGLE-3, all of them off."""
    LAYOUTS["upstream peagle"](world, tmp_path / "theirs")
    spoil_config(tmp_path / "theirs", fc_norm=False, norm_output=None)
    imported(world, tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("layout", ["sglang eagle3", "upstream eagle3"])
def test_a_draft_that_is_narrower_than_its_verifier_reads_its_states(world, layout, tmp_path):
    """SafeAILab's draft of Llama-3.3-70B is 6,144 wide and reads states of 8,192, with embeddings of its own."""
    theirs, out = tmp_path / "theirs", tmp_path / "ours"
    layers = LAYOUTS[layout](world, theirs).model.config.transformer_layer_config["num_hidden_layers"]
    folder = make_tiny_verifier(tmp_path / "wide", hidden_size=64)
    tensors = load_file(theirs / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tensors["fc.weight"] = torch.randn(32, 3 * 64, generator=generator)
    tensors["embed_tokens.weight"] = torch.randn(320, 32, generator=generator)
    spoil_config(theirs, target_hidden_size=64)
    spoil_tensors(theirs, lambda _: tensors)
    done = import_checkpoint(theirs, verifier_of(folder), out)
    model = SpeculatorModel.from_pretrained(done.folder)
    assert (model.config.target_hidden_size, len(model.layers)) == (64, layers)
    engine = Engine(folder)
    prompt = torch.tensor(world.prompts[0])
    decoded, plain = (
        decode(CachedVerifier(engine.model, ids), drafter, prompt, max_new_tokens=8, num_tokens=3).tokens
        for drafter, ids in ((model.draft(), model.draft().target_layer_ids), (None, ()))
    )
    assert decoded == plain
    with pytest.raises(ArtifactError, match=r"its target_hidden_size is 64, but the verifier .* has 32"):
        imported(world, theirs, tmp_path / "other")
    spoil_tensors(theirs, lambda kept: {name: each for name, each in kept.items() if "embed" not in name})
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight is missing"):
        import_checkpoint(theirs, verifier_of(folder), tmp_path / "other")


def test_another_verifier_is_reported_by_its_sizes_before_its_layers(world, tmp_path):
    """Layer ids beyond the last layer are a consequence, and would mislead."""
    LAYOUTS["upstream eagle3"](world, tmp_path / "theirs")
    folder = make_tiny_verifier(tmp_path / "other", num_hidden_layers=2, hidden_size=64)
    with pytest.raises(ArtifactError, match=r"its hidden_size is 32, but the verifier .* has 64") as caught:
        import_checkpoint(tmp_path / "theirs", verifier_of(folder), tmp_path / "ours")
    assert "ascending ids" not in str(caught.value)


def test_a_run_names_the_checkpoint_in_it(world, tmp_path):
    """A run folder, which `spec export` takes, has no weights itself; the error names its speculator."""
    LAYOUTS["upstream eagle3"](world, tmp_path / "run" / "speculator")
    with pytest.raises(ArtifactError, match=r"(?s)has no weights.*the checkpoint is .*run/speculator"):
        imported(world, tmp_path / "run", tmp_path / "ours")


def test_an_upstream_residual_must_be_explicit(world, tmp_path):
    """Trainer and server have different defaults for norm_before_residual, so none is assumed."""
    LAYOUTS["upstream eagle3"](world, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    del config["norm_before_residual"]
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="lacks norm_before_residual"):
        imported(world, tmp_path / "theirs", tmp_path / "ours")


def test_a_frozen_copy_that_was_trained_is_noticed(world, tmp_path):
    """A file whose embeddings differ from the verifier's is refused, because it would be served with the verifier's."""
    written = LAYOUTS["z-lab dflash"](world, tmp_path / "theirs")
    embeddings = written.model.embed_tokens.weight.detach().clone()
    spoil_tensors(tmp_path / "theirs", lambda tensors: {**tensors, "embed_tokens.weight": embeddings})
    imported(world, tmp_path / "theirs", tmp_path / "same")
    spoil_tensors(tmp_path / "theirs", lambda tensors: {**tensors, "embed_tokens.weight": embeddings + 1})
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight differs from the verifier's"):
        imported(world, tmp_path / "theirs", tmp_path / "other")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt"])
def test_pickles_are_never_opened(world, checkpoint, tmp_path, name):
    """The error gives the reason and a program that converts them without executing them."""
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    for path in (checkpoint, checkpoint / name):
        with pytest.raises(ArtifactError, match=rf"(?s){name}.*pickle can run any program.*weights_only=True"):
            imported(world, path, tmp_path / "ours")


def test_the_program_that_converts_pickles_does_what_it_says_whatever_their_name(world, checkpoint, tmp_path):
    """Users paste the program into a shell, and the author of the file chose its name."""
    name = """it's "a" $(touch owned)'); print(1) #.bin"""
    torch.save({"a": torch.ones(2)}, checkpoint / name)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ArtifactError) as caught:
        imported(world, checkpoint, tmp_path / "ours")
    (line,) = (line for line in str(caught.value).splitlines() if line.startswith("  python -c "))
    done = subprocess.run(["sh", "-c", line], cwd=checkpoint, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not (checkpoint / "owned").exists()
    assert torch.equal(load_file(checkpoint / "model.safetensors")["a"], torch.ones(2))


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"])
def test_an_index_cannot_name_files_elsewhere(world, checkpoint, tmp_path, file):
    """Nothing outside the folder is read, whatever the index says."""
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": file}}))
    with pytest.raises(ArtifactError, match="names files that are not safetensors beside it"):
        imported(world, checkpoint, tmp_path / "ours")


def test_a_missing_shard_is_named(world, tmp_path):
    """An interrupted download is reported as incomplete."""
    LAYOUTS["sglang eagle3.1, sharded"](world, tmp_path / "theirs")
    (tmp_path / "theirs" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"lacks model-00002-of-00002\.safetensors"):
        imported(world, tmp_path / "theirs", tmp_path / "ours")


def test_an_unknown_format_is_an_error_that_lists_the_known_ones(world, tmp_path):
    """The error names the first tensors and every known format."""
    write(tmp_path / "theirs", {"model_type": "llama"}, {"transformer.h.0.weight": torch.ones(2)})
    with pytest.raises(ArtifactError, match=r"(?s)transformer\.h\.0\.weight.*DFlash of z-lab"):
        imported(world, tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ArtifactError, match="there is no checkpoint at"):
        imported(world, tmp_path / "nowhere", tmp_path / "ours")


def test_float16_is_kept_value_by_value(world, checkpoint, tmp_path):
    """Older checkpoints are in float16, which no CPU trains or multiplies in; float32 represents the same numbers."""
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    spoil_tensors(checkpoint, lambda tensors: halves)
    done = import_checkpoint(checkpoint, verifier_of(world.folder), tmp_path / "ours")
    imported = load_file(done.folder / "model.safetensors")
    assert imported["fc.weight"].dtype == torch.float32
    assert torch.equal(imported["fc.weight"], halves["fc.weight"].float())
    assert any("float16" in note for note in done.notes)


def test_embeddings_of_another_verifier_are_noted(world, tmp_path):
    """Another verifier of the same sizes is noted; the right one is not."""
    LAYOUTS["upstream eagle3"](world, tmp_path / "theirs")
    other = make_tiny_verifier(tmp_path / "v", seed=1)
    for folder, noted in ((world.folder, False), (other, True)):
        done = import_checkpoint(tmp_path / "theirs", verifier_of(folder), tmp_path / f"ours-{noted}")
        assert any("this is another verifier" in note for note in done.notes) is noted


def test_an_import_never_overwrites(world, checkpoint, tmp_path):
    """An existing folder is left alone."""
    (tmp_path / "ours").mkdir()
    with pytest.raises(ArtifactError, match="name another folder"):
        imported(world, checkpoint, tmp_path / "ours")


def test_the_norms_of_the_built_models_are_not_ones(world):
    """No norm of the fixtures is all ones, so that a swapped or dropped norm changes the compared logits."""
    model = build(world, "eagle3", 96)
    norms = [tensor for name, tensor in own(model).items() if "norm" in name]
    assert norms
    assert all((tensor != 1).all() for tensor in norms)
