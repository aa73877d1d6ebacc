"""Exports contain what servers read, and are refused if a server would draft something else."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import attrs
import huggingface_hub
import made_results
import pytest
import torch
from models.conftest import LAYER_IDS
from models.test_mtp import HYBRID, native_names
from safetensors.torch import load_file, save_file

from speculators.bench.result import Live
from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.contract import build_model
from speculators.errors import ArtifactError, VerifierError
from speculators.exchange.export import ExportRequest, export
from speculators.exchange.hub import push
from speculators.exchange.importing import Verifier, import_checkpoint
from speculators.facts import VerifierFacts
from speculators.formats.server_layout import TARGETS
from speculators.model import SpeculatorModel, read_config
from speculators.recipe.input_sections import VerifierSection
from speculators.runs.background import Background
from speculators.runs.tunings import RunTuning
from speculators.verifier.tiny import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, make_tiny_verifier

BLOCK = {"num_layers": 2, "block_size": 4}
WHOLE = {"mtp", "eagle1"}
OPTIONS = {"dflash": BLOCK, "dspark": {**BLOCK, "markov_rank": 8}, "medusa": {"num_heads": 4}}


def saved(world, folder: Path, algorithm: str = "eagle3", draft_vocab_size: int | None = 256, **options) -> Path:
    """Saves a speculator whose draft vocabulary has the tokens that end a turn."""
    config = SpeculatorModelConfig.get_class(algorithm)(**options)
    torch.manual_seed(0)
    kwargs = world.kwargs(config, None if algorithm in WHOLE else draft_vocab_size)
    if kwargs["target_layer_ids"] == LAYER_IDS:
        # SGLang does not capture the last layer's output.
        kwargs["target_layer_ids"] = (1, 2, 3)
    model = build_model(algorithm, world.engine.facts, kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def speculator(world, tmp_path) -> Path:
    """An EAGLE-3 speculator that SGLang can serve too."""
    return saved(world, tmp_path / "speculator", norm_before_residual=False)


def request(world, speculator: Path, target: str, **changes) -> ExportRequest:
    plain = ExportRequest(
        speculator=speculator,
        target=target,
        out=speculator.with_name(f"out-{target}"),
        name="tiny",
        verifier=world.folder,
        verifier_name=None,
        dtype=None,
    )
    return attrs.evolve(plain, **changes)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **values) -> None:
    config = config_of(folder)
    for path, value in values.items():
        *places, last = path.split("__")
        table = config
        for place in places:
            table = table[place]
        table[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_the_layout_of_vllm_is_ours_in_bf16_under_a_portable_name(world, speculator):
    """Config and tensor names are those of the speculator, floats are bf16, maps stay integers."""
    done = export(request(world, speculator, "vllm", verifier_name="owner/model"))
    ours, theirs = load_file(speculator / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(theirs[name], expected), name
    config = config_of(speculator)
    config["speculators_config"]["verifier"]["name_or_path"] = "owner/model"
    assert config_of(done.folder) == config
    assert done.command == f"vllm serve {done.folder.absolute()}"
    assert done.command in (done.folder / "serve.md").read_text()


def test_keys_that_no_layer_reads_are_not_exported(world, speculator):
    """A run of an earlier version saved the verifier's M-RoPE keys, with which vLLM refuses the draft."""
    rope = dict(config_of(speculator)["transformer_layer_config"]["rope_parameters"])
    mrope = {**rope, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "type": "default"}
    change_config(speculator, transformer_layer_config__rope_parameters=mrope)
    vllm, sglang = (config_of(export(request(world, speculator, target)).folder) for target in ("vllm", "sglang"))
    assert vllm["transformer_layer_config"]["rope_parameters"] == rope
    assert sglang["rope_scaling"] is None


def test_another_number_of_states_is_written_into_the_decoder(world, speculator):
    """vLLM assumes three states: a checkpoint that fuses two says so, even if its config came without."""
    config = config_of(speculator)
    config["eagle_aux_hidden_state_layer_ids"] = [1, 3]
    (speculator / "config.json").write_text(json.dumps(config))
    tensors = load_file(speculator / "model.safetensors")
    save_file({**tensors, "fc.weight": tensors["fc.weight"][:, :64].contiguous()}, speculator / "model.safetensors")
    for changes in ({}, {"transformer_layer_config__num_aux_hidden_states": 5}):
        change_config(speculator, **changes)
        done = export(request(world, speculator, "speculators"))
        assert config_of(done.folder)["transformer_layer_config"]["num_aux_hidden_states"] == 2


def test_a_wrong_number_of_three_states_is_put_right(world, speculator):
    """Servers read the number of layer ids, whatever number the config came with."""
    change_config(speculator, transformer_layer_config__num_aux_hidden_states=5)
    done = export(request(world, speculator, "vllm"))
    assert config_of(done.folder)["transformer_layer_config"]["num_aux_hidden_states"] == 3


@pytest.mark.parametrize(
    ("algorithm", "values", "message"),
    [
        ("eagle3", {"speculators_config__proposal_methods": []}, "must have at least one entry"),
        ("medusa", {"speculators_config__proposal_methods": []}, "must have at least one entry"),
        ("eagle3", {"transformer_layer_config__rope_parameters": None}, "no model can be built from its config.json"),
        (
            "eagle3",
            {"transformer_layer_config__rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "(?s)no model can be built.*factor",
        ),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": []}, "lacks eagle_aux_hidden_state_layer_ids"),
        ("dflash", {"aux_hidden_state_layer_ids": None}, "lacks aux_hidden_state_layer_ids"),
        ("peagle", {"fc_norm": True}, "fc_norm = True: vLLM ignores it"),
        ("peagle", {"scale": None}, "scale: unknown key"),
    ],
)
def test_a_config_that_is_not_one_of_our_drafts_is_a_readable_error(world, tmp_path, algorithm, values, message):
    """The message is ours, not an exception of the algorithm's code or of transformers."""
    speculator = saved(world, tmp_path / "speculator", algorithm, **OPTIONS.get(algorithm, {}))
    change_config(speculator, **values)
    with pytest.raises(ArtifactError, match=message):
        export(request(world, speculator, "vllm"))


def test_a_round_trip_through_sglang_is_exact(world, speculator, tmp_path):
    """Names, layer ids, options and every float32 bit survive, and so the drafts are the same."""
    done = export(request(world, speculator, "sglang", dtype="float32"))
    config = config_of(done.folder)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert config["rope_theta"] == world.engine.facts.rope_parameters["rope_theta"]
    names = load_file(done.folder / "model.safetensors")
    assert "midlayer.self_attn.q_proj.weight" in names
    assert not any(name.startswith(("layers.", "embed_tokens.")) for name in names)
    assert "--speculative-algorithm EAGLE3" in done.command
    assert f"--speculative-draft-model-path {done.folder.absolute()}" in done.command
    verifier = Verifier(folder=world.folder, name=str(world.folder), facts=world.engine.facts)
    back = import_checkpoint(done.folder, verifier, tmp_path / "back").folder
    ours, theirs = load_file(speculator / "model.safetensors"), load_file(back / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    row = world.row(0, 1, layer_ids=(1, 2, 3))
    batch = {name: row[name] for name in ("hidden_states", "input_ids", "position_ids", "document_ids")}
    one, other = (
        list(SpeculatorModel.from_pretrained(folder).replay(**batch, num_speculative_tokens=3))
        for folder in (speculator, back)
    )
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("algorithm", [name for name in CONFIGS.names() if name != "mtp"])
def test_every_algorithm_of_the_package_is_served_by_vllm(world, tmp_path, algorithm):
    """Each has a layout and a command that names the export; where it is ours, the export loads as a speculator."""
    speculator = saved(world, tmp_path / "speculator", algorithm, **OPTIONS.get(algorithm, {}))
    done = export(request(world, speculator, "vllm"))
    assert str(done.folder.absolute()) in done.command
    assert done.command.startswith("vllm serve ")
    if "speculators_model_type" in config_of(done.folder):
        assert SpeculatorModel.from_pretrained(done.folder).config.speculators_model_type == algorithm


def test_eagle1_leaves_to_vllm_what_the_verifier_has(world, tmp_path):
    """Head, final norm and maps are not exported; the decoder is at the top of config.json."""
    speculator = saved(world, tmp_path / "speculator", "eagle1")
    done = export(request(world, speculator, "vllm", dtype="float32"))
    names = load_file(done.folder / "model.safetensors")
    assert all(name.startswith(("fc.", "layers.0.")) for name in names)
    assert config_of(done.folder)["hidden_size"] == 32
    assert '"method": "eagle"' in done.command
    verifier = Verifier(folder=world.folder, name=str(world.folder), facts=world.engine.facts)
    back = import_checkpoint(done.folder, verifier, tmp_path / "back").folder
    ours, theirs = load_file(speculator / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_native_head_is_served_inside_a_copy_of_its_verifier(tmp_path):
    """The export is the verifier with the trained head; it is refused if the verifier is not on this machine."""
    folder = make_tiny_verifier(tmp_path / "v", model_type="qwen3_5_text", **HYBRID)
    head = {name: torch.randn(shape) for name, shape in native_names("qwen3_5_text").items()}
    save_file(head, folder / "model-mtp.safetensors")
    facts = VerifierFacts.read(folder / "config.json")
    speculator = import_checkpoint(
        folder, Verifier(folder=folder, name=str(folder), facts=facts), tmp_path / "speculator"
    ).folder
    native = ExportRequest(
        speculator=speculator,
        target="vllm",
        out=tmp_path / "out",
        name="tiny",
        verifier=folder,
        verifier_name=None,
        dtype=None,
    )
    done = export(native)
    tensors = load_file(done.folder / "model-mtp.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in head.items())
    assert (done.folder / "tokenizer.json").is_file()
    assert '"method": "mtp"' in done.command
    assert done.dtype == json.loads((done.folder / "export.json").read_text())["dtype"] == "the verifier's"
    with pytest.raises(ArtifactError, match="whose dtypes it takes: leave out --dtype"):
        export(attrs.evolve(native, dtype="float32", out=tmp_path / "other"))
    with pytest.raises(ArtifactError, match="give --verifier"):
        export(attrs.evolve(native, verifier=None, out=tmp_path / "other"))


REFUSALS = {
    "a rotary embedding of another kind": (
        "vllm",
        {"transformer_layer_config__rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "rope_type 'proportional': vLLM knows default",
    ),
    "a rotary embedding that is not said": (
        "sglang",
        {"transformer_layer_config__rope_parameters": {"rope_type": "default"}},
        "lack rope_theta",
    ),
    "mixed attention": (
        "vllm",
        {"transformer_layer_config__layer_types": ["full_attention", "sliding_attention"]},
        "layer_types mixes",
    ),
    "a window that would be lost": ("vllm", {"transformer_layer_config__sliding_window": 64}, "without the window"),
    "layer ids out of order": ("vllm", {"eagle_aux_hidden_state_layer_ids": [2, 1, 4]}, "ascending order"),
    "the residual": ("sglang", {"norm_before_residual": True}, "algorithm.norm_before_residual = false"),
    "the last state": (
        "sglang",
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
        "nothing enters the one after the last",
    ),
    "part of a head": (
        "sglang",
        {"transformer_layer_config__rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rotates whole heads",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_an_export_that_would_be_served_wrongly_is_refused_with_the_reason(world, speculator, what, monkeypatch):
    """Nothing is written; the reason names the value and what the server does instead."""
    target, values, message = REFUSALS[what]
    # No model here can have some of these values; only config.json states them, and servers read it.
    monkeypatch.setattr(SpeculatorModel, "from_saved", classmethod(lambda cls, folder: _with_config(folder, values)))
    with pytest.raises(ArtifactError, match=message) as caught:
        export(request(world, speculator, target))
    assert f"{TARGETS[target]} would not draft what was trained" in str(caught.value)
    assert not speculator.with_name(f"out-{target}").exists()


ORIGINAL = SpeculatorModel.from_saved.__func__


def _with_config(folder, values):
    model = ORIGINAL(SpeculatorModel, folder)
    change_config(folder, **values)
    model.config = read_config(folder)
    return model


def test_all_reasons_are_reported_together(world, tmp_path):
    """SGLang's layout has no norm over all states, no head norms, one layer and another residual: one error names
    all four."""
    options = {"norm_before_fc": True, "num_layers": 2, "decoder": {"model_type": "qwen3"}}
    speculator = saved(world, tmp_path / "speculator", **options)
    with pytest.raises(ArtifactError) as caught:
        export(request(world, speculator, "sglang"))
    for message in ("norm_before_residual", "norm_before_fc", "decoder.model_type 'qwen3'", "num_layers 2"):
        assert message in str(caught.value)


def with_vocabulary(world, folder: Path, drafted: torch.Tensor) -> Path:
    """Saves a speculator that drafts these tokens."""
    model, _ = world.build(SpeculatorModelConfig.get_class("eagle3")(norm_before_residual=False), len(drafted))
    model.get_buffer("d2t").copy_(drafted - torch.arange(len(drafted)))
    model.get_buffer("t2d").copy_(torch.zeros(320, dtype=torch.bool).index_fill_(0, drafted, True))
    model.save_pretrained(folder)
    return folder


def test_a_draft_that_cannot_end_a_turn_is_refused(world, tmp_path):
    """The draft vocabulary must contain the token that ends a turn; without the verifier, a note says that this was
    not checked."""
    speculator = with_vocabulary(world, tmp_path / "speculator", torch.arange(100, 196))
    with pytest.raises(ArtifactError, match="token 2 ends a turn and is not in the draft vocabulary"):
        export(request(world, speculator, "vllm"))
    done = export(request(world, speculator, "vllm", verifier=None))
    assert any("was not checked" in note for note in done.notes)


def test_turns_end_as_the_template_of_the_recipe_says(world, tmp_path):
    """A run whose recipe replaces the chat template is checked against that one, not the verifier folder's."""
    template = tmp_path / "mine.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    section = VerifierSection(model=str(world.folder), chat_template=str(template))
    rest = torch.arange(100, 195)
    theirs = with_vocabulary(world, tmp_path / "theirs", torch.cat((torch.tensor([TURN_END]), rest)))
    ours = with_vocabulary(world, tmp_path / "ours", torch.cat((torch.tensor([END_OF_TEXT]), rest)))
    export(request(world, theirs, "vllm"))
    with pytest.raises(ArtifactError, match=f"token {END_OF_TEXT} ends a turn and is not in the draft vocabulary"):
        export(request(world, theirs, "vllm", section=section))
    with pytest.raises(ArtifactError, match=f"token {TURN_END} ends a turn"):
        export(request(world, ours, "vllm"))
    assert export(request(world, ours, "vllm", section=section)).notes
    template.unlink()
    with pytest.raises(VerifierError, match=r"verifier\.chat_template: .*mine\.jinja cannot be read"):
        export(request(world, ours, "vllm", section=section))


def test_serve_md_renders_conversations_as_training_did(world, speculator, tmp_path):
    """Every command, that of the server without drafts included, names the recipe's template and its arguments; SGLang
    takes the arguments from the requests."""
    template = tmp_path / "mine.jinja"
    template.write_text(CHAT_TEMPLATE + "{% if enable_thinking %}{{ tone }}{% endif %}")
    arguments = {"enable_thinking": False, "tone": "it's calm"}
    section = VerifierSection(model=str(world.folder), chat_template=str(template), template=arguments)
    pages = {}
    for target in ("vllm", "sglang"):
        done = export(request(world, speculator, target, section=section, background=filed(1, 3)))
        pages[target] = (done.folder / "serve.md").read_text()
        lines = [line for line in pages[target].splitlines() if line.startswith(("vllm serve", "python -m sglang"))]
        assert len(lines) == 4
        for words in map(shlex.split, lines):
            assert words[words.index("--chat-template") + 1] == str(template)
            stated = [words[n + 1] for n, word in enumerate(words) if word == "--default-chat-template-kwargs"]
            assert list(map(json.loads, stated)) == ([arguments] if target == "vllm" else [])
        assert any(f"the chat template {template}" in note for note in done.notes)
        (sent,) = [line for line in pages[target].splitlines() if "/chat/completions" in line]
        body = json.loads(shlex.split(sent.replace("$MODEL", "name"))[-1])
        assert body["model"] == "name"
        assert body.get("chat_template_kwargs") == (None if target == "vllm" else arguments)
    assert "each request must carry" in pages["sglang"]
    assert "ends with .jinja" not in pages["sglang"]
    other = Path(shutil.copyfile(template, tmp_path / "mine.txt"))
    done = export(request(world, speculator, "sglang", section=attrs.evolve(section, chat_template=str(other))))
    assert any("ends with .jinja" in note for note in done.notes)


def filed(*ks: int, **changes) -> Background:
    """Makes the background of a run that measured these K: tau rises with K, and the speed-up falls from 5."""

    def live(k: int) -> Live:
        fast = {"speed_up": {1: 1.1, 3: 1.3}.get(k, 1.2), **changes}
        return attrs.evolve(made_results.live(), speed=made_results.speed(**fast))

    exact = {k: made_results.acceptance(tau=1 + 0.3 * k) for k in ks}
    settings = [made_results.setting(num_speculative_tokens=k, exact=exact[k], live=live(k)) for k in ks]
    return Background(run="run", settings=tuple(settings))


def test_an_export_drafts_the_best_k_that_its_run_measured(world, speculator):
    """The fastest, not the one with the longest acceptance; --k asks for another, and config.json states it."""
    plain = request(world, speculator, "vllm", background=filed(1, 3, 7))

    def drafts(**changes) -> tuple[int, str]:
        done = export(attrs.evolve(plain, **changes))
        methods = config_of(done.folder)["speculators_config"]["proposal_methods"]
        assert methods[0]["speculative_tokens"] == done.num_speculative_tokens
        return done.num_speculative_tokens, done.why_k

    assert drafts() == (3, "the fastest that the run measured")
    assert drafts(k=5) == (5, "as asked by --k")
    guessed, why = drafts(background=filed(1, 3, 7, unmatched_baseline=True))
    assert (guessed, "a guess" in why) == (7, True)
    assert drafts(background=Background()) == (3, "which config.json names; no K was measured")


def test_an_export_takes_over_what_spec_tune_chose(world, speculator):
    """The fastest that was tuned in process, whatever benchmarks say of other K; --k still asks for another."""
    measured = made_results.candidate(2, predicted=1.5, measured=1.6)
    tuned = RunTuning(in_process=made_results.tuning(measured, made_results.candidate(4, predicted=1.7)))
    plain = request(world, speculator, "vllm", background=attrs.evolve(filed(1, 3), tuning=tuned))
    done = export(plain)
    assert (done.num_speculative_tokens, done.why_k) == (2, "the fastest that spec tune found in process")
    assert config_of(done.folder)["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2
    assert export(attrs.evolve(plain, k=5)).num_speculative_tokens == 5


def test_a_schedule_stands_in_the_command_and_on_the_card(world, speculator):
    """vLLM takes K by batch size from --speculative-config alone; SGLang has no such option and gets no vLLM's K."""
    by_batch = ((1, 16, 3), (17, 64, 1), (65, 128, 0))
    background = Background(run="run", tuning=RunTuning(served=made_results.served_tuning(*by_batch)))
    done = export(request(world, speculator, "hub", background=background))
    (options,) = [json.loads(word) for word in shlex.split(done.command) if word.startswith("{")]
    assert options["num_speculative_tokens"] == done.num_speculative_tokens == 3
    assert options["num_speculative_tokens_per_batch_size"] == [list(each) for each in by_batch]
    for page in ("serve.md", "README.md"):
        assert "1 to 16: 3, 17 to 64: 1, 65 to 128: 0" in (done.folder / page).read_text()
    other = export(request(world, speculator, "sglang", background=background))
    assert "which config.json names" in other.why_k


def test_a_schedule_that_no_option_takes_is_left_out_with_a_note(world, tmp_path):
    """The K of the smallest batches stays."""
    speculator = saved(world, tmp_path / "speculator", "peagle")
    background = Background(run="run", tuning=RunTuning(served=made_results.served_tuning((1, 4, 3), (5, 8, 0))))
    done = export(request(world, speculator, "vllm", background=background))
    assert done.num_speculative_tokens == 3
    assert any("K by batch size is left out" in note for note in done.notes)
    assert "per_batch_size" not in done.command


def test_an_algorithm_limits_the_k_of_its_export(world, tmp_path):
    """A block of four drafts three tokens; larger K that a benchmark measured are passed over."""
    speculator = saved(world, tmp_path / "speculator", "dflash", **BLOCK)
    plain = request(world, speculator, "vllm", background=filed(1, 3, 7, speed_up=1.5))
    assert export(plain).num_speculative_tokens <= 3
    with pytest.raises(ArtifactError, match="--k must be at most 3"):
        export(attrs.evolve(plain, k=7))


@pytest.mark.parametrize(("target", "port"), [("vllm", 8000), ("sglang", 30000)])
def test_serve_md_has_every_measured_k_and_how_to_try_and_compare(world, speculator, target, port):
    """Each K has its acceptance length, its speed-up and a command; curl and the comparison use the server's port."""
    done = export(request(world, speculator, target, background=filed(1, 3, 7)))
    page = (done.folder / "serve.md").read_text()
    for k, tau, speed_up in ((1, "1.300", "1.10x"), (3, "1.900", "1.30x"), (7, "3.100", "1.20x")):
        row = next(line for line in page.splitlines() if line.startswith(f"| mine | 20 | {k} |"))
        assert tau in row
        assert speed_up in row
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith(("vllm serve", "python -m sglang"))]
    if target == "vllm":
        stated = [json.loads(each[-1]) for each in commands if "--speculative-config" in each]
        assert [each["num_speculative_tokens"] for each in stated] == [1, 3, 7]
        assert {(each["method"], each["model"]) for each in stated} == {("eagle3", str(done.folder))}
    else:
        flag = "--speculative-num-steps"
        assert [each[each.index(flag) + 1] for each in commands if flag in each] == ["3", "1", "3", "7"]
    assert f"curl -s http://localhost:{port}/v1/chat/completions" in page
    assert f"--endpoint http://localhost:{port} --baseline-endpoint http://localhost:{port + 1}" in page
    assert any("with --verifier-name" in note for note in done.notes)


def test_other_stop_tokens_outside_of_the_draft_vocabulary_are_noted(world, tmp_path):
    """Llama 3.1 names three stop tokens; an imported map may lack the two with which no turn ends."""
    verifier = tmp_path / "verifier"
    shutil.copytree(world.folder, verifier)
    (verifier / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300, 310]}))
    drafted = torch.cat((torch.tensor([2]), torch.arange(100, 195)))
    done = export(request(world, with_vocabulary(world, tmp_path / "speculator", drafted), "vllm", verifier=verifier))
    notes = [note for note in done.notes if "not in the draft vocabulary" in note]
    assert [note.split(",")[0] for note in notes] == ["token 300", "token 310"]
    assert all(note in (done.folder / "serve.md").read_text() for note in notes)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("dflash", {**BLOCK, "sample_from_anchor": True}, "shifts the block by one"),
        ("dflash", {"num_layers": 2, "block_size": 3}, "a block of 3 drafts 2"),
        ("dspark", {**BLOCK, "markov_rank": 8, "markov_head_type": "gated"}, "'gated': vLLM has"),
        ("medusa", {"num_heads": 2}, "there are 2 heads"),
        ("mtp", {}, "MTP layers that come with a verifier"),
    ],
)
def test_an_algorithm_says_what_vllm_does_not_do(world, tmp_path, algorithm, options, message):
    """Options that vLLM ignores, and more drafts than there are, are refused."""
    speculator = saved(world, tmp_path / "speculator", algorithm, **options)
    with pytest.raises(ArtifactError, match=message):
        export(request(world, speculator, "vllm"))


def test_an_algorithm_without_a_layout_is_an_error_that_lists_its_layouts(world, tmp_path):
    """SGLang's layout exists only for EAGLE-3; the error lists the algorithm's own layouts."""
    speculator = saved(world, tmp_path / "speculator", "dflash", **BLOCK)
    with pytest.raises(ArtifactError, match=r"(?s)sglang has no layout for the algorithm 'dflash'.*vllm, speculators"):
        export(request(world, speculator, "sglang"))


def test_weights_that_are_not_numbers_are_not_exported(world, tmp_path):
    """The weights of a diverged training are refused."""
    speculator = saved(world, tmp_path / "speculator")
    model = SpeculatorModel.from_pretrained(speculator)
    model.fc.weight.data[0, 0] = torch.nan
    model.save_pretrained(speculator)
    with pytest.raises(ArtifactError, match=r"fc\.weight has values that are not finite"):
        export(request(world, speculator, "vllm"))


def test_an_export_replaces_an_export_and_nothing_else(world, speculator):
    """A folder without the record of an export belongs to somebody else and is not touched."""
    first = export(request(world, speculator, "vllm"))
    again = export(request(world, speculator, "vllm", dtype="float32"))
    assert first.folder == again.folder
    assert load_file(again.folder / "model.safetensors")["fc.weight"].dtype == torch.float32
    with pytest.raises(ArtifactError, match="exists and is not an export"):
        export(request(world, speculator, "vllm", out=speculator))
    assert (speculator / "model.safetensors").is_file()


def test_an_export_can_be_written_into_the_working_folder(world, speculator, tmp_path, monkeypatch):
    """The working folder becomes the export, although `.` has no name beside which a temporary folder could be made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = export(request(world, speculator, "vllm", out=Path()))
    assert done.folder == tmp_path / "here"
    assert {"config.json", "model.safetensors", "serve.md"} <= {path.name for path in done.folder.iterdir()}
    assert str(tmp_path / "here") in done.command


def test_only_a_push_uploads_to_the_hub(world, speculator, monkeypatch):
    """The repository is made if necessary, the whole folder is uploaded, and a failure says how to continue."""
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, exist_ok: calls.append(("create", repo, exist_ok)))
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda **arguments: calls.append(arguments) or "https://hub/commit"
    )
    done = export(request(world, speculator, "hub", verifier_name="owner/model", address="me/draft"))
    assert calls == []
    assert done.command == "vllm serve me/draft"
    card = (done.folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/model\n")
    assert "Not measured." in card
    assert push(done.folder, "me/draft") == "https://hub/commit"
    assert calls[0] == ("create", "me/draft", True)
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/draft", done.folder)

    def fails(**arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "upload_folder", fails)
    with pytest.raises(ArtifactError, match=r"(?s)no route to host.*hf upload me/draft"):
        push(done.folder, "me/draft")


def test_a_verifier_of_this_machine_is_noted_on_the_way_to_the_hub(world, speculator):
    """Nobody else has the verifier's folder, so a note asks for its public name."""
    done = export(request(world, speculator, "hub"))
    assert any("--verifier-name" in note for note in done.notes)
