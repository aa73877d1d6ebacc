"""The main job end to end on the shipped `smoke` recipe: stages, run folder, second run, bench, plan, regenerate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import WEIGHTS, Outcome, Spec, events
from facts import facts_of

from speculators.contract import build_model, parameter_counts
from speculators.cost.sizes import with_parameters
from speculators.cost.trace import trace
from speculators.errors import ArtifactError
from speculators.events import Event, ProgressEvent
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel
from speculators.pipeline.arguments import training_kwargs
from speculators.pipeline.context import Context
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan

STAGES = ["verifier", "prepare", "capture", "train", "bench"]


def skipped(outcome: Outcome) -> list[str]:
    return [line.split()[0] for line in outcome.err.splitlines() if "already done:" in line]


def test_the_first_run_reports_every_stage_and_ends_in_the_table(smoke: Outcome) -> None:
    """Progress goes to stderr, the acceptance table with its definition to stdout."""
    assert [stage for stage in STAGES if f"{stage} done in" in smoke.err] == STAGES
    assert "acceptance length" in smoke.err
    assert "tau = tokens emitted a round" in smoke.out
    assert "DISAGREES" not in smoke.out
    assert "peak memory" in smoke.out


def test_the_run_folder_holds_recipe_plan_lock_events_checkpoints_speculator_and_bench(run_folder: Path) -> None:
    """The folder contains everything that section 9 of the design names, each file readable by itself."""
    assert (run_folder / "recipe.toml").read_text() == Path(load_recipe("smoke").file).read_text()
    plan, lock = (json.loads((run_folder / name).read_text()) for name in ("plan.json", "lock.json"))
    assert [stage["name"] for stage in plan["stages"]] == STAGES
    assert lock["fingerprints"] == {stage["name"]: stage["fingerprint"] for stage in plan["stages"]}
    assert lock["environment"]["packages"].keys() >= {"spec-recipes", "torch", "transformers"}
    assert plan["run_name"] == run_folder.name
    assert [path.name for path in sorted((run_folder / "checkpoints").iterdir())] == ["step-00000004", "step-00000008"]
    assert {path.name for path in (run_folder / "speculator").iterdir()} == {"config.json", "model.safetensors"}
    (bench,) = (run_folder / "bench").iterdir()
    result = json.loads(bench.read_text())
    assert result["fingerprint"] == lock["fingerprints"]["bench"]
    assert [setting["num_speculative_tokens"] for setting in result["settings"]] == [1, 3]
    assert result["agrees"]


def test_the_log_holds_every_event_but_progress(run_folder: Path) -> None:
    """Updates, evaluations, checkpoints and stages are logged from the beginning, each with its time."""
    assert [event["step"] for event in events(run_folder, "StepEvent")[:8]] == list(range(1, 9))
    assert [event["step"] for event in events(run_folder, "EvalEvent")[:2]] == [4, 8]
    assert [event["step"] for event in events(run_folder, "SaveEvent")[:2]] == [4, 8]
    assert events(run_folder, "StageEvent")[0]["stage"] == "verifier"
    assert events(run_folder, "ProgressEvent") == []


def test_the_speculator_is_the_best_checkpoint_and_names_its_verifier(run_folder: Path) -> None:
    """The speculator loads without the run, and with the verifier that a server needs."""
    model = SpeculatorModel.from_pretrained(run_folder / "speculator")
    assert Path(model.config.speculators_config.verifier.name_or_path).is_dir()
    assert model.config.speculators_config.proposal_methods[0].speculative_tokens == 1
    done = json.loads((run_folder / "train.json").read_text())
    assert done["tau"] == max(event["tau"] for event in events(run_folder, "EvalEvent"))


def test_the_second_run_skips_every_stage_and_gives_the_same_result(spec: Spec, run_folder: Path) -> None:
    """Nothing is written again; `--json` prints only the stored benchmark."""
    before = (run_folder / WEIGHTS).stat().st_mtime_ns
    outcome = spec.run("--json")
    assert outcome.code == 0
    assert skipped(outcome) == STAGES
    assert " done in " not in outcome.err
    (bench,) = (run_folder / "bench").iterdir()
    assert outcome.json["bench"] == json.loads(bench.read_text())
    assert outcome.json["run"] == str(run_folder)
    assert (run_folder / WEIGHTS).stat().st_mtime_ns == before


def test_quiet_prints_the_result_alone(spec: Spec, smoke: Outcome) -> None:
    """No progress is printed."""
    outcome = spec.run("--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert "acceptance of smoke-" in outcome.out


def test_a_run_can_be_started_from_its_own_recipe_file(spec: Spec, run_folder: Path) -> None:
    """The recipe in the run folder reproduces the run: all stages are already done, even if it is copied onto
    itself."""
    text = (run_folder / "recipe.toml").read_text()
    outcome = spec("run", run_folder / "recipe.toml", "--runs", spec.runs)
    assert outcome.code == 0, outcome.err
    assert skipped(outcome) == STAGES
    assert (run_folder / "recipe.toml").read_text() == text


def test_another_algorithm_setting_trains_anew_on_the_same_states(spec: Spec, smoke: Outcome) -> None:
    """Stages that the change does not reach come from the cache, and the output says so."""
    outcome = spec.run("--set", "algorithm.ttt_steps=2", "--set", "schedule.max_steps=1")
    assert outcome.code == 0, outcome.err
    assert skipped(outcome) == ["verifier", "prepare", "capture"]
    assert "train done in" in outcome.err
    assert "bench done in" in outcome.err


def test_a_damaged_shard_is_named_and_captured_again(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """One flipped byte in the states stops the run that reads it; the same command captures the shard again, and
    trains to the same bytes."""
    key = json.loads((run_folder / "lock.json").read_text())["fingerprints"]["capture"]
    (shard,) = (spec.cache / "states" / key[:16]).rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    command = ("run", "smoke", "--runs", tmp_path / "runs", "--set", "benchmark.live_prompts=1")
    stopped = spec(*command)
    assert stopped.code == 1
    assert f"damaged: {shard.name}" in stopped.err
    assert "run again: only these shards will be captured again" in stopped.err
    outcome = spec(*command)
    assert outcome.code == 0, outcome.err
    assert "capture done in" in outcome.err
    (other,) = (tmp_path / "runs").iterdir()
    assert (other / WEIGHTS).read_bytes() == (run_folder / WEIGHTS).read_bytes()


def test_an_altered_speculator_is_exported_again(spec: Spec, run_folder: Path) -> None:
    """A stage whose output has changed is not skipped; training resumes from its last checkpoint."""
    whole = (run_folder / WEIGHTS).read_bytes()
    (run_folder / WEIGHTS).write_bytes(whole[:100])
    outcome = spec.run()
    assert outcome.code == 0, outcome.err
    assert "train done in" in outcome.err
    assert (run_folder / WEIGHTS).read_bytes() == whole


def test_another_first_k_becomes_the_number_that_servers_draft(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """K does not affect training: the existing speculator gets the new K, and the output says so."""
    config = Path(shutil.copytree(run_folder, tmp_path / run_folder.name)) / "speculator" / "config.json"
    weights = config.with_name("model.safetensors").stat().st_mtime_ns
    again = ("run", "smoke", "--runs", tmp_path, "--set", "benchmark.num_speculative_tokens=[3]")
    outcome = spec(*again)
    assert outcome.code == 0, outcome.err
    assert "servers now draft 3 tokens per round, 1 before" in outcome.err
    (method,) = json.loads(config.read_text())["speculators_config"]["proposal_methods"]
    assert method["speculative_tokens"] == 3
    assert "servers now draft" not in spec(*again).err
    assert config.with_name("model.safetensors").stat().st_mtime_ns == weights
    assert list(tmp_path.glob("smoke-*")) == [config.parents[1]]


def test_a_benchmark_in_an_older_format_is_made_again(spec: Spec, run_folder: Path) -> None:
    """A benchmark in an older format is measured again; training is not touched."""
    (file,) = (run_folder / "bench").glob("*.json")
    benchmark = json.loads(file.read_text())
    file.write_text(json.dumps({**benchmark, "format": benchmark["format"] - 1}))
    outcome = spec.run()
    assert outcome.code == 0, outcome.err
    assert "bench done in" in outcome.err
    assert "train done in" not in outcome.err
    assert json.loads(file.read_text())["format"] == benchmark["format"]


@pytest.mark.parametrize("inside", ["", "speculator"])
def test_bench_measures_a_run_or_its_speculator(spec: Spec, run_folder: Path, tmp_path: Path, inside: str) -> None:
    """The recipe's own suite, verifier and dtype are the defaults; options replace them, and the result can be
    stored."""
    out = tmp_path / "result.json"
    outcome = spec("bench", run_folder / inside, "--k", 2, "--prompts", 2, "--live", 1, "--json", "--out", out)
    assert outcome.code == 0, outcome.err
    (setting,) = outcome.json["settings"]
    assert setting["num_speculative_tokens"] == 2
    assert setting["suite"] == "quickstart"
    assert setting["exact"]["prompts"] == 2
    assert outcome.json["dtype"] == "float32"
    assert json.loads(out.read_text()) == outcome.json


def test_a_result_that_cannot_be_stored_is_printed_anyway(
    spec: Spec, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up during the benchmark does not lose the measurement."""

    def full(path: Path, value: object) -> None:
        raise ArtifactError(f"{path}: the disk is full")

    monkeypatch.setattr("speculators.files.disk.write_json", full)
    options = ("--k", 1, "--prompts", 1, "--live", 1, "--out", tmp_path / "result.json")
    for form in ((), ("--json",)):
        outcome = spec("bench", run_folder, *options, *form)
        assert (outcome.code, "the disk is full" in outcome.err) == (1, True)
        assert "K=1, T=0" in outcome.out


def test_bench_of_a_speculator_alone_takes_the_verifier_that_its_config_names(
    spec: Spec, run_folder: Path, tmp_path: Path
) -> None:
    """A checkpoint copied out of its run is measured like any other."""
    (tmp_path / "mine").mkdir()
    for file in (run_folder / "speculator").iterdir():
        (tmp_path / "mine" / file.name).write_bytes(file.read_bytes())
    outcome = spec("bench", tmp_path / "mine", "--k", 1, "--prompts", 1, "--live", 1)
    assert outcome.code == 0, outcome.err
    assert "quickstart, T=0, 1 prompts" in outcome.out
    assert "K=1, T=0" in outcome.out


def test_plan_shows_the_stages_on_disk_and_the_size_of_the_model(spec: Spec, run_folder: Path) -> None:
    """Before the run no stage is on disk, after it every stage is; the counts equal those of the trained model."""
    done = spec("plan", "smoke", "--runs", spec.runs, "--json").json
    assert done["on_disk"] == dict.fromkeys(STAGES, True)
    other = spec("plan", "smoke", "--runs", spec.runs, "--json", "--set", "algorithm.ttt_steps=5").json
    assert other["on_disk"] == {**dict.fromkeys(STAGES, True), "train": False, "bench": False}
    printed = spec("plan", "smoke", "--runs", spec.runs).out
    assert f"parameters, trainable  {done['parameters']['trainable']:,}" in printed
    model = SpeculatorModel.from_pretrained(run_folder / "speculator")
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(done["parameters"].values())


@pytest.mark.parametrize(
    "overrides",
    [[], ['algorithm.draft_vocab_size="none"'], ["algorithm.lm_head_trainable=true", "algorithm.num_layers=2"]],
)
def test_parameter_counts_equal_those_of_the_real_model(tiny_verifier: Path, overrides: list[str]) -> None:
    """The counts of a model built without storage equal those of a model with the verifier's weights."""
    plan = make_plan(load_recipe("smoke", overrides), VerifierFacts.read(tiny_verifier / "config.json"))
    reduced = plan.draft_vocab_size < plan.facts.vocab_size
    kwargs = training_kwargs(plan, str(tiny_verifier), torch.arange(plan.draft_vocab_size) if reduced else None)
    real = build_model("eagle3", plan.facts, kwargs)
    assert with_parameters(plan).parameters == parameter_counts(real)
    assert parameter_counts(real)["trainable"] > 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("eagle3_llama8b", 128_256 + 32_000),
        ("eagle3_r1_llama8b", 128_256 + 32_000),
        ("eagle3_qwen3_4b", 151_936 + 32_000),
        ("eagle3_qwen3_8b", 151_936 + 32_000),
        ("eagle3_llama70b", 128_256 + 32_000),
        ("eagle3_qwen3_30b_a3b", 151_936 + 32_000),
        ("eagle3_gpt_oss_20b", 201_088 + 32_000),
    ],
)
def test_the_large_recipes_are_counted_from_a_config_alone(name: str, rows: int, tmp_path: Path) -> None:
    """No weights are needed: embeddings and the reduced head are frozen; one decoder layer and fc are trained."""
    recipe = load_recipe(name)
    facts = facts_of(recipe, tmp_path)
    plan = make_plan(recipe, facts)
    hidden, inner = facts.hidden_size, facts.intermediate_size
    queries, keys = (facts[name] * facts.head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    layer = 2 * hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    trainable = 3 * hidden**2 + layer + 7 * hidden  # the last are norms
    assert with_parameters(plan).parameters == {"trainable": trainable, "frozen": rows * hidden}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("medusa_llama8b", 4096),
        ("peagle_qwen3_8b", (151_936 + 32_000) * 4096),
        ("dflash_qwen3_8b", 0),
        ("dspark_qwen3_1_7b", 0),
        ("dspark_qwen3_8b", 0),
        ("mtp_qwen3_next", None),
    ],
)
def test_the_other_algorithms_recipes_are_planned_from_a_config_alone(
    name: str, frozen: int | None, tmp_path: Path
) -> None:
    """The recipes validate, and the frozen parameters are those taken from the verifier that a server does not
    share."""
    recipe = load_recipe(name)
    plan = make_plan(recipe, facts_of(recipe, tmp_path))
    counts = with_parameters(plan).parameters
    assert counts["trainable"] > 10**8
    assert frozen is None or counts["frozen"] == frozen
    assert trace(plan, [96, 160], supervised=0.5, kind="cpu").row_flops > 0


def test_regenerate_answers_prompts_with_provenance(spec: Spec, smoke: Outcome, tmp_path: Path) -> None:
    """Old answers are replaced by the verifier's, and everything that determines them is recorded beside; a second
    call gives the same."""
    rows = [{"id": str(n), "messages": [{"role": "user", "content": f"What is {n}?"}]} for n in range(3)]
    rows[1]["messages"].append({"role": "assistant", "content": "an old answer"})
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("regenerate", "smoke", prompts, "--out", out, "--set", "data.regenerate={max_new_tokens=6}")
    outcome = spec(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["conversations"] == 3
    assert outcome.json["sampling"]["max_new_tokens"] == 6
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in answers] == ["0", "1", "2"]
    assert [[message["role"] for message in row["messages"]] for row in answers] == [["user", "assistant"]] * 3
    assert "an old answer" not in out.read_text()
    first = out.read_bytes()
    assert "3 conversations" in spec(*arguments).out
    assert out.read_bytes() == first
    assert {path.name for path in out.parent.iterdir()} == {"answers.jsonl", "answers.jsonl.json"}
    outcome = spec(*arguments[:-1], "data.regenerate={max_new_tokens=5}")
    assert (outcome.code, out.read_bytes()) == (2, first)
    assert f"{out} exists, with other answers" in outcome.err


def test_a_recipe_can_regenerate_its_data_first(fresh: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """`[data.regenerate]` replaces the answers before they are prepared, under one bar; the file is stored in the
    cache."""
    heard: list[ProgressEvent] = []
    emit = Context.emit

    def listening(self: Context, event: Event) -> None:
        if isinstance(event, ProgressEvent) and event.stage in ("regenerate", "prepare"):
            heard.append(event)
        emit(self, event)

    monkeypatch.setattr(Context, "emit", listening)
    outcome = fresh.run("--set", "data.regenerate={max_new_tokens=8}", "--set", "benchmark.suites=[]")
    assert outcome.code == 0, outcome.err
    (file,) = (fresh.cache / "regenerated").glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 24
    assert "no suite to choose by: exported the last of 8 updates" in outcome.err
    assert {(event.stage, event.total) for event in heard} == {("prepare", 100)}
    assert "regenerate: 24 of 24 prompts" in next(event.note for event in heard if event.done == 95)
    assert (heard[-1].done, heard[-1].note) == (100, "prepare: 24 of 24 conversations")


def test_the_draft_vocabulary_can_always_end_an_answer(run_folder: Path) -> None:
    """The draft vocabulary contains the verifier's own end tokens, however rare they are in the data."""
    model = SpeculatorModel.from_pretrained(run_folder / "speculator")
    folder = Path(model.config.speculators_config.verifier.name_or_path)
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert end in model.draft_to_target.tolist()
