"""`spec diff` compares meaning, not spelling: what is invalidated, whether results are comparable, runs' numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Spec

from speculators.bench.statistics import bootstrap_difference
from speculators.report.diff import sparkline

ONE = """\
format = 1
name = "one"
version = "1.0.0"
extends = "smoke"
[schedule]
max_steps = 3
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The command line, with a home that the tests of this file share."""
    return Spec(tmp_path_factory.mktemp("diff"))


@pytest.fixture(scope="module")
def runs(spec: Spec) -> dict[str, str]:
    """Two runs of smoke that differ in the learning rate, and one with another suite length."""
    sets = {
        "plain": (),
        "faster": ("--set", "schedule.optimizer.lr=5e-3"),
        "shorter": ("--set", "benchmark.suites=[{name='quickstart', take=3}]"),
    }
    made = {}
    for name, arguments in sets.items():
        outcome = spec.run(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        made[name] = outcome.json["run"]
    return made


@pytest.fixture
def altered(runs: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    """Copies the plain run and changes one of its JSON files."""

    def make(file: str, change: Callable[[Any], Any]) -> Path:
        copy = Path(shutil.copytree(runs["plain"], tmp_path / "copy", dirs_exist_ok=True))
        (path,) = copy.glob(file)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return copy

    return make


def _stage(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in plan["stages"] if stage["name"] == name)


def _commit() -> None:
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)


def test_spelling_is_no_difference(spec: Spec, tmp_path: Path) -> None:
    """Underscores, order, comments, explicit defaults and the recipe's name make no difference."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE + "tokens_per_step = 1_024\nrow_tokens = 512\n")
    text = ONE.replace('name = "one"', 'name = "other"').replace("max_steps = 3\n", "")
    other.write_text(
        text + "row_tokens = 512   # the same\ntokens_per_step = 1024\nmax_steps = 3\nkeep_checkpoints = 2\n"
    )
    outcome = spec("diff", one, other)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "no difference in meaning" in outcome.out


def test_a_change_gives_both_values_origins_and_consequence(spec: Spec, tmp_path: Path) -> None:
    """A change gives both values, where each was written, and the consequence; exit 1."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE)
    other.write_text(ONE.replace("max_steps = 3", "max_steps = 6") + "[algorithm]\ndraft_vocab_size = 256\n")
    outcome = spec("diff", one, other, "--json")
    assert outcome.code == 1
    changes = {change["path"]: change for change in outcome.json["changes"]}
    assert set(changes) == {"schedule.max_steps", "algorithm.draft_vocab_size"}
    steps = changes["schedule.max_steps"]
    assert (steps["before"], steps["after"], steps["consequence"]) == (3, 6, "2 times the updates")
    assert steps["before_from"].endswith("one.toml:6")
    vocabulary = changes["algorithm.draft_vocab_size"]
    assert vocabulary["before_from"].startswith("extends")
    assert vocabulary["after_from"].endswith("other.toml:8")


def test_stages_and_verdict_need_the_verifiers_config(spec: Spec, tmp_path: Path, tiny_verifier: Path) -> None:
    """With config.json: another objective trains and measures again, reuses states, and keeps results comparable."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE)
    other.write_text(ONE + '[algorithm]\nname = "eagle3"\nttt_steps = 2\n')
    comparison = spec("diff", one, other, "--verifier-config", tiny_verifier / "config.json", "--json").json
    assert {stage["stage"]: stage["status"] for stage in comparison["stages"]} == {
        "verifier": "reused",
        "prepare": "reused",
        "capture": "reused",
        "train": "runs again",
        "bench": "runs again",
    }
    assert comparison["comparable"] is True


def test_runs_give_metrics_paired_by_prompt_and_curves(spec: Spec, runs: dict[str, str]) -> None:
    """On the same prompts, tau's difference comes with an interval."""
    comparison = spec("diff", runs["plain"], runs["faster"], "--json").json
    assert [change["path"] for change in comparison["changes"]] == ["schedule.optimizer.lr"]
    assert comparison["comparable"] is True
    assert {row["num_speculative_tokens"] for row in comparison["metrics"]} == {1, 3}
    for row in comparison["metrics"]:
        low, high = row["interval"]
        assert low <= row["after"] - row["before"] <= high
    assert len(comparison["curves"]["a"]["loss"]) == len(comparison["curves"]["b"]["loss"]) == 8
    assert comparison["environment"] == {}


def test_other_prompts_do_not_compare(spec: Spec, runs: dict[str, str]) -> None:
    """The reason names both suites, and no metrics are compared."""
    comparison = spec("diff", runs["plain"], runs["shorter"], "--json").json
    assert comparison["comparable"] is False
    assert "the suites differ (quickstart@" in comparison["reasons"][0]
    assert comparison["metrics"] == []


def test_a_run_equals_itself(spec: Spec, runs: dict[str, str]) -> None:
    """A run compared with itself exits with 0, and every stage is reused."""
    outcome = spec("diff", runs["plain"], runs["plain"], "--json")
    assert outcome.code == 0
    assert {stage["status"] for stage in outcome.json["stages"]} == {"reused"}


def test_markdown_is_for_a_pull_request(spec: Spec, runs: dict[str, str]) -> None:
    """Markdown has the changes, the stages and the verdict."""
    outcome = spec("diff", runs["plain"], runs["faster"], "--md")
    assert "| `schedule.optimizer.lr` |" in outcome.out
    assert "| train | runs again | schedule.optimizer.lr 0.001 -> 0.005 |" in outcome.out
    assert "**results are comparable**" in outcome.out
    assert "<br><sub>--set</sub>" in outcome.out
    assert outcome.out.count("* `loss, ") == 2
    assert "* `tau, " in outcome.out


def test_a_git_revision_of_a_recipe(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REV:path reads the file at that revision, together with the recipe that it extends."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    base, mine = tmp_path / "recipes" / "base.toml", tmp_path / "recipes" / "mine.toml"
    base.write_text(ONE)
    mine.write_text('format = 1\nname = "mine"\nversion = "1.0.0"\nextends = "./base.toml"\n')
    # One level of extending: the base is written out.
    base.write_text((Path(__file__).parents[2] / "recipes" / "smoke.toml").read_text())
    _commit()
    assert spec("diff", "HEAD:recipes/mine.toml", "recipes/mine.toml").code == 0
    mine.write_text(mine.read_text() + "seed = 7\n")
    outcome = spec("diff", "HEAD:recipes/mine.toml", "recipes/mine.toml", "--json")
    assert [(change["path"], change["after"]) for change in outcome.json["changes"]] == [("seed", 7)]


def test_a_revision_has_its_own_data(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data file that changed since then is a change; a note names files that git does not have."""
    monkeypatch.chdir(tmp_path)
    row = '{"messages": [{"role": "user", "content": "CONTENT"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "mine.toml").write_text(ONE + '[data]\nsources = [{ path = "rows.jsonl" }]\n')
    _commit()
    assert spec("diff", "HEAD:mine.toml", "mine.toml").code == 0
    (tmp_path / "rows.jsonl").write_text(row.replace("CONTENT", "another"))
    outcome = spec("diff", "HEAD:mine.toml", "mine.toml", "--json")
    assert outcome.code == 1
    (change,) = outcome.json["changes"]
    assert change["path"] == "data.sources[0].path"
    assert change["before_from"] == "HEAD:mine.toml:8"
    assert change["before"].startswith(f"{tmp_path}/rows.jsonl (sha256 ")
    assert change["before"] != change["after"]
    assert outcome.json["notes"] == [
        "HEAD:mine.toml: benchmark.suites[0] is read as it is installed today: quickstart",
    ]


def test_other_data_under_the_same_recipe_is_a_difference(spec: Spec, runs: dict[str, str], altered: Any) -> None:
    """The change shows the content's hash, the invalidated stage its reason, and the exit code is 1."""

    def change(plan: dict[str, Any]) -> None:
        prepare = _stage(plan, "prepare")
        prepare["inputs"]["sources"][0]["sha256"] = "0" * 64
        prepare["fingerprint"] = "1" * 64

    outcome = spec("diff", runs["plain"], altered("plan.json", change), "--json")
    assert outcome.code == 1
    assert [(each["path"], each["consequence"]) for each in outcome.json["changes"]] == [
        ("data.sources[0].path", "different training data")
    ]
    assert "(sha256 00000000)" in outcome.json["changes"][0]["after"]
    (prepare,) = (stage for stage in outcome.json["stages"] if stage["stage"] == "prepare")
    assert prepare["status"] == "runs again"
    assert prepare["because"][0].endswith(" -> 00000000")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("plan.json", lambda plan: _stage(plan, "train").update(fingerprint="0" * 64)),
        ("lock.json", lambda lock: lock["environment"].update(threads=64)),
        ("lock.json", lambda lock: lock["environment"]["code"].update(sources="0" * 64)),
        ("bench/*.json", lambda bench: bench["settings"][0]["exact"].update(tau=3.0)),
    ],
)
def test_differences_beside_the_recipe_count(spec: Spec, runs: dict[str, str], altered: Any, file, change) -> None:
    """A stage that runs again, another environment, other code or other numbers exit with 1."""
    outcome = spec("diff", runs["plain"], altered(file, change))
    assert outcome.code == 1
    assert "the recipes are equivalent" in outcome.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bench: bench["settings"][0].update(definition="other"), "the definitions of tau differ at quickstart"),
        (lambda bench: bench.update(dtype="bfloat16"), "the precisions in which the verifier computed differ"),
    ],
)
def test_results_measured_differently_are_not_comparable(
    spec: Spec, runs: dict[str, str], altered: Any, change, message: str
) -> None:
    """Results are comparable if the definition and the precision in which the verifier really computed agree."""
    comparison = spec("diff", runs["plain"], altered("bench/*.json", change), "--json").json
    assert comparison["comparable"] is False
    assert message in comparison["reasons"][0]


def test_another_precision_of_training_is_mentioned(spec: Spec, runs: dict[str, str], altered: Any) -> None:
    """Results are comparable, because both were measured alike; the reasons mention rounding."""
    copy = altered("plan.json", lambda plan: plan.update(precision="bf16"))
    comparison = spec("diff", runs["plain"], copy, "--json").json
    assert comparison["comparable"] is True
    assert "trained in fp32 / bf16" in comparison["reasons"][1]


def test_stages_that_run_again_have_a_cost(spec: Spec, runs: dict[str, str]) -> None:
    """Costs come from the run's own record of tokens and seconds; a reused stage has none."""
    comparison = spec("diff", runs["plain"], runs["faster"], "--json").json
    costs = {stage["stage"]: stage.get("cost") for stage in comparison["stages"]}
    assert costs["capture"] is None
    assert costs["train"].endswith(f"s on cpu ({Path(runs['faster']).name})")
    assert " tokens in " in costs["train"]


def test_a_run_keeps_where_its_values_come_from(spec: Spec, runs: dict[str, str], altered: Any) -> None:
    """A run records file, line or --set for each value; runs that predate this give their plan.json."""
    (change,) = spec("diff", runs["plain"], runs["faster"], "--json").json["changes"]
    assert change["before_from"].endswith("smoke.toml:27")
    assert change["after_from"] == "--set"
    old = altered("plan.json", lambda plan: plan.pop("origins"))
    (change,) = spec("diff", old, runs["faster"], "--json").json["changes"]
    assert change["before_from"] == f"{old}/plan.json"


def test_coverage_comes_from_the_runs(spec: Spec, runs: dict[str, str], altered: Any) -> None:
    """The consequence gives the coverage of supervised tokens before and after."""
    copy = altered("plan.json", lambda plan: plan["recipe"]["algorithm"].update(draft_vocab_size=64))
    (change,) = spec("diff", runs["plain"], copy, "--json").json["changes"]
    assert ", target coverage " in change["consequence"]


WIDTH = 32  # of the tiny verifier's states
MEDUSA = '[algorithm]\nname = "medusa"\nnum_heads = 3\n'


@pytest.mark.parametrize(
    ("algorithm", "sizes", "expected"),
    [
        ("[algorithm]\n", (256, 192), f"{-64 * WIDTH:+,} parameters"),
        (MEDUSA, (256, 192), f"{-3 * 64 * WIDTH:+,} parameters"),
        ("[algorithm]\n", ('"none"', 192), f"{-(320 - 192) * WIDTH:+,} parameters"),
    ],
)
def test_a_draft_vocabulary_is_explained_in_parameters_of_the_model(
    spec: Spec, tmp_path: Path, algorithm: str, sizes: tuple[object, object], expected: str
) -> None:
    """All heads of a model count; "none" means the verifier's whole vocabulary."""
    files = [tmp_path / "one.toml", tmp_path / "other.toml"]
    for file, size in zip(files, sizes, strict=True):
        file.write_text(f"{ONE}{algorithm}draft_vocab_size = {size}\n")
    (change,) = spec("diff", *files, "--json").json["changes"]
    assert (change["path"], change["consequence"]) == ("algorithm.draft_vocab_size", expected)


def test_without_a_model_a_draft_vocabulary_is_explained_by_one_head(
    spec: Spec, runs: dict[str, str], altered: Any
) -> None:
    """A run records its sizes, but not how many heads there are."""
    copy = altered("plan.json", lambda plan: plan["recipe"]["algorithm"].update(draft_vocab_size=64))
    (change,) = spec("diff", runs["plain"], copy, "--json").json["changes"]
    assert " rows of one head" in change["consequence"]


@pytest.mark.parametrize(
    ("values", "reused", "message"),
    [
        ('[verifier]\ndtype = "bfloat16"\n', ["verifier", "prepare"], "a different precision of the verifier"),
        ('[data]\nstates_dtype = "bfloat16"\n', ["verifier", "prepare"], "the same conversations"),
        ("[benchmark]\nsuites = [{name = 'quickstart', take = 3}]\n", ["verifier"], "kept out of the training data"),
    ],
)
def test_a_consequence_does_not_contradict_the_stages(
    spec: Spec, tmp_path: Path, values: str, reused: list[str], message: str
) -> None:
    """A consequence that promises reuse, or a repetition, agrees with the status of the stages."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE)
    other.write_text(ONE + values)
    comparison = spec("diff", one, other, "--json").json
    assert [stage["stage"] for stage in comparison["stages"] if stage["status"] == "reused"] == reused
    assert all(message in change["consequence"] for change in comparison["changes"])


def test_a_key_that_an_older_schema_lacked_is_no_difference(spec: Spec, runs: dict[str, str], altered: Any) -> None:
    """A missing key equals its default on the other side; a whole missing table does not."""
    old = altered("plan.json", lambda plan: plan["recipe"]["data"].pop("server"))
    assert spec("diff", old, runs["plain"]).code == 0
    table = {"max_new_tokens": 160, "temperature": 0.0, "batch_size": 64, "seed": 0, "dtype": None}
    copy = altered("plan.json", lambda plan: plan["recipe"]["data"].update(regenerate=table))
    comparison = spec("diff", runs["plain"], copy, "--json").json
    assert {change["path"] for change in comparison["changes"]} == {f"data.regenerate.{key}" for key in table}


def test_all_benchmarks_of_a_run_count_and_a_damaged_one_is_noted(
    spec: Spec, runs: dict[str, str], altered: Any
) -> None:
    """A newer file with another suite does not hide an older one; a damaged file is noted."""
    copy = altered("plan.json", lambda plan: None)
    (file,) = (copy / "bench").glob("*.json")
    content = json.loads(file.read_text())
    for setting in content["settings"]:
        setting["suite"] = "other"
    (copy / "bench" / "newer.json").write_text(json.dumps(content))
    (copy / "bench" / "torn.json").write_text('{"format"')
    comparison = spec("diff", runs["plain"], copy, "--json").json
    assert {row["suite"] for row in comparison["metrics"]} == {"quickstart"}
    assert len(comparison["metrics"]) == 2
    assert comparison["notes"][0].startswith(f"{copy}: bench/torn.json is left out: it is damaged")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("events.jsonl", '{"event": "StepEvent", "step": 1}', "events.jsonl:1: damaged: StepEvent without total_steps"),
        ("events.jsonl", '{"event": "EvalEvent", "tau": 1.5}', "events.jsonl:1: damaged: EvalEvent without step"),
        ("lock.json", '{"environment": 3}', "lock.json: damaged: its environment is 3"),
        ("plan.json", '{"recipe": {}, "stages": []}', "plan.json: damaged: its recipe lacks verifier"),
        ("plan.json", "[", "plan.json: missing or damaged"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(
    spec: Spec, runs: dict[str, str], altered: Any, file: str, content: str, message: str
) -> None:
    """A damaged run exits with 2, because 1 means a difference; the report says so too, without traceback."""
    copy = altered("plan.json", lambda plan: None)
    (copy / file).write_text(content)
    outcome = spec("diff", runs["plain"], copy)
    assert outcome.code == 2
    assert message in outcome.err
    report = spec("report", copy, "--against", runs["plain"], "--json")
    assert report.code == 0, report.err


def test_a_bench_stage_without_inputs_is_named(spec: Spec, runs: dict[str, str], altered: Any) -> None:
    """The error names the inputs that are missing."""
    outcome = spec("diff", runs["plain"], altered("plan.json", lambda plan: _stage(plan, "bench").update(inputs={})))
    assert outcome.code == 2
    assert "its stages lack bench.dtype, bench.suites" in outcome.err


def test_a_bar_in_a_value_does_not_end_its_cell(spec: Spec, tmp_path: Path) -> None:
    """A bar in a path is escaped for Markdown."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    (tmp_path / "a|b.jsonl").write_text("{}\n")
    one.write_text(ONE)
    other.write_text(ONE + '[data]\nsources = [{ path = "a|b.jsonl" }]\n')
    assert r"a\|b.jsonl" in spec("diff", one, other, "--md").out


def test_the_locks_know_verifiers_that_are_not_here(spec: Spec) -> None:
    """Stages and verdict of the shipped recipes need no download."""
    comparison = spec("diff", "eagle3_qwen3_8b", "peagle_qwen3_8b", "--json").json
    assert next(stage for stage in comparison["stages"] if stage["stage"] == "verifier")["status"] == "reused"
    assert comparison["comparable"] is not None


def test_one_config_is_not_that_of_two_verifiers(spec: Spec, tmp_path: Path, tiny_verifier: Path) -> None:
    """One config.json for two verifiers exits with 2 and names both."""
    other = tmp_path / "other.toml"
    other.write_text(ONE + '[verifier]\nmodel = "tiny:1"\n')
    outcome = spec("diff", "smoke", other, "--verifier-config", tiny_verifier / "config.json")
    assert outcome.code == 2
    assert "the verifiers differ (tiny:0 / tiny:1)" in outcome.err


def test_plan_warns_of_a_config_that_is_another_models(spec: Spec) -> None:
    """The locks know the named verifier, but the plan uses the file, with a warning."""
    config = Path(__file__).parents[1] / "fixtures" / "llama-3.1-8b" / "config.json"
    outcome = spec("plan", "smoke", "--verifier-config", config, "--json")
    assert outcome.code == 0, outcome.err
    assert "does not belong to tiny:0: hidden_size 4096, not 32" in outcome.err


@pytest.mark.parametrize(
    ("a", "message"),
    [("no-such", "no-such"), ("HEAD~999:recipes/x.toml", "git"), ("nowhere:recipes/x.toml", "git")],
)
def test_a_missing_side_is_one_error(spec: Spec, a: str, message: str) -> None:
    """A missing recipe or revision exits with 2, without traceback."""
    outcome = spec("diff", a, "smoke")
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    """Prompts differ more than two models do on each of them, and pairing removes that (seeded)."""
    generator = np.random.default_rng(0)
    rounds = generator.uniform(20, 60, 50)
    tau = generator.uniform(1.2, 2.6, 50)
    before, after = (np.stack([rounds * (tau + gain), rounds], 1) for gain in (0.0, 0.05))
    low, high = bootstrap_difference(before, after)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)


def test_a_sparkline_shows_its_ends() -> None:
    """Falling values give falling bars between the first and the last value."""
    line = sparkline([4.0, 3.0, 2.0, 1.0])
    assert line == "4.000 █▆▃▁ 1.000"
