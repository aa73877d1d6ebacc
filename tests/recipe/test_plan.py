"""The plan: checks across sections, derived values, and fingerprints of exactly what matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from facts import facts_of

from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan

Write = Callable[..., str]
STAGES = ["verifier", "prepare", "capture", "train", "bench"]


def changed(before: Plan, after: Plan) -> list[str]:
    return [s.name for s in after.stages if s.fingerprint != before.stage(s.name).fingerprint]


def refusals(path: str, facts: VerifierFacts, *overrides: str, world_size: int = 1) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(path, overrides), facts, world_size=world_size)
    return {problem.path: str(problem) for problem in caught.value.problems}


@pytest.fixture
def plan_of(write: Write, llama: VerifierFacts) -> Callable[..., Plan]:
    """Plans the minimal recipe with cached states and overrides."""

    def make(*overrides: str, world_size: int = 1, name: str = "mine.toml") -> Plan:
        path = write(name=name)
        return make_plan(load_recipe(path, ('data.hidden_states="cached"', *overrides)), llama, world_size=world_size)

    return make


def test_a_plan_has_every_derived_value(plan_of: Callable[..., Plan]) -> None:
    """Layer ids, D, rows and stages follow from recipe and verifier; the plan is JSON."""
    plan = plan_of()
    assert plan.target_layer_ids == (2, 16, 29)
    assert plan.draft_vocab_size == 64
    assert (plan.row_tokens, plan.rows_per_step) == (256, 4)
    assert [stage.name for stage in plan.stages] == STAGES
    assert all(len(stage.fingerprint) == 64 for stage in plan.stages)
    assert plan.run_name == f"mine-{plan.stage('train').fingerprint[:8]}"
    assert json.loads(json.dumps(plan.to_dict()))["draft_vocab_size"] == 64
    assert plan.steps is None
    assert plan_of("schedule.max_steps=7").steps == 7


def test_the_whole_vocabulary_is_the_default(plan_of: Callable[..., Plan]) -> None:
    """Without draft_vocab_size, D = V."""
    assert plan_of('algorithm.draft_vocab_size="none"').draft_vocab_size == 128256


def test_online_states_need_no_capture_and_no_suites_no_bench(plan_of: Callable[..., Plan]) -> None:
    """Stages that would do nothing are not in the plan."""
    plan = plan_of('data.hidden_states="online"', "benchmark.suites=[]")
    assert [stage.name for stage in plan.stages] == ["verifier", "prepare", "train"]


def test_where_stored_states_are_read_from_changes_no_fingerprint(plan_of: Callable[..., Plan]) -> None:
    """The states are the same in an object store; a recipe that stores none cannot name one."""
    assert changed(plan_of(), plan_of('data.store="s3://bucket/states"')) == []
    with pytest.raises(RecipeError, match=r'not with data\.hidden_states = "online"'):
        plan_of('data.store="s3://bucket/states"', 'data.hidden_states="online"')


def test_a_servers_states_are_a_store_of_their_own(plan_of: Callable[..., Plan]) -> None:
    """Its bits differ from those in process, so the store is another; the address of the server changes nothing."""
    cached, served = plan_of(), plan_of('data.hidden_states="server"')
    assert [stage.name for stage in served.stages] == STAGES
    assert changed(cached, served) == ["capture", "train", "bench"]
    elsewhere = (
        'data.server={endpoints=["https://host:9/v1"], folder="/shared", concurrency=64, retries=1, timeout=9.0}'
    )
    assert changed(served, plan_of('data.hidden_states="server"', elsewhere)) == []
    assert changed(cached, plan_of(elsewhere)) == []


def test_streamed_states_are_another_training_than_online_ones(plan_of: Callable[..., Plan]) -> None:
    """Neither is stored, but servers round otherwise; which servers they are changes nothing."""
    online, streamed = (plan_of(f'data.hidden_states="{kind}"') for kind in ("online", "streamed"))
    assert [stage.name for stage in streamed.stages] == [stage.name for stage in online.stages]
    assert changed(online, streamed) == ["train", "bench"]
    elsewhere = 'data.server={endpoints=["http://a:1", "http://b:1"], folder="/shared", concurrency=64}'
    assert changed(streamed, plan_of('data.hidden_states="streamed"', elsewhere)) == []


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ('verifier.revision="def"', STAGES),
        ("verifier.trust_remote_code=true", STAGES),
        ("verifier.template={enable_thinking=false}", STAGES),
        ("data.train_on='last'", STAGES[1:]),
        ("data.train_on='all'", []),
        ("data.allow_lost=1.0", []),
        ("data.max_tokens=128", STAGES[1:]),
        ("data.sources=[{path='rows.jsonl', take=1}]", STAGES[1:]),
        ("data.regenerate={max_new_tokens=4}", STAGES[1:]),
        ("benchmark.suites=[{name='held', path='rows.jsonl', split='other'}]", STAGES[1:]),
        ("algorithm.target_layer_ids=[1, 2, 3]", STAGES[2:]),
        ('data.states_dtype="float16"', STAGES[2:]),
        ('verifier.dtype="float32"', STAGES[2:]),
        ("seed=1", STAGES[3:]),
        ("algorithm.ttt_steps=5", STAGES[3:]),
        ("algorithm.draft_vocab_size=65", STAGES[3:]),
        ("algorithm.decoder={intermediate_size=8}", STAGES[3:]),
        ("schedule.optimizer.lr=2e-3", STAGES[3:]),
        ("schedule.row_tokens=512", STAGES[3:]),
        ("schedule.evaluate_every=5", STAGES[3:]),
        ("benchmark.num_speculative_tokens=[3, 7]", STAGES[3:]),
        ("benchmark.num_speculative_tokens=[1, 5]", STAGES[4:]),
        ("benchmark.max_new_tokens=5", STAGES[4:]),
        ("benchmark.live_prompts=2", STAGES[4:]),
        ("benchmark.temperature=[0.0, 1.0]", STAGES[4:]),
        ('name="another"', []),
        ('summary="other text"', []),
        ('version="2.0.0"', []),
        ("schedule.checkpoint_every=5", []),
        ("schedule.keep_checkpoints=5", []),
        ("distributed.shard=false", []),
        ('distributed.shard="node"', []),
        ('schedule.gradient_precision="bf16"', STAGES[3:]),
        ('schedule.gradient_precision="fp32"', []),
        ("schedule.row_tokens=256", []),
        ("algorithm.target_layer_ids=[2, 16, 29]", []),
        ('algorithm.weights="walk"', STAGES[3:]),
        ('algorithm.weights="depth"', []),
        ("schedule.ema=0.99", STAGES[3:]),
        ('schedule.ema="none"', []),
        ('expect={"held/K=3/T=0" = {tau=[1.0, 2.0], source="a run"}}', []),
    ],
)
def test_a_change_invalidates_exactly_the_stages_it_can_change(
    plan_of: Callable[..., Plan], override: str, stages: list[str]
) -> None:
    """A fingerprint covers what can change the output; writing out a default changes nothing."""
    assert changed(plan_of(), plan_of(override)) == stages


def test_a_chat_template_enters_by_its_content(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """Another template changes every stage; the same one under another name changes nothing."""
    (tmp_path / "one.jinja").write_text("{{ messages }}")
    (tmp_path / "two.jinja").write_text("{{ messages }}")
    one = plan_of('verifier.chat_template="./one.jinja"')
    assert changed(plan_of(), one) == STAGES
    assert changed(one, plan_of('verifier.chat_template="./two.jinja"')) == []


def test_names_paths_and_processes_are_in_no_fingerprint(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """The same content under another file name, planned for another number of processes, is the same work."""
    before = plan_of()
    (tmp_path / "renamed.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    moved = (
        "data.sources=[{path='renamed.jsonl'}]",
        "benchmark.suites=[{name='own', path='renamed.jsonl', split='test'}]",
    )
    assert changed(before, plan_of(*moved, world_size=2, name="elsewhere.toml")) == []


def test_the_content_of_a_data_file_is_in_the_fingerprint(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """One more row changes every stage from prepare on."""
    before = plan_of()
    recipe = load_recipe("mine.toml", ['data.hidden_states="cached"'])
    (tmp_path / "rows.jsonl").write_text("more\n")
    assert changed(before, make_plan(recipe, before.facts)) == STAGES[1:]


def test_a_local_verifier_is_identified_by_the_content_of_its_files(
    write: Write, llama: VerifierFacts, tmp_path: Path
) -> None:
    """A file that changed in place makes another verifier; the same files in another folder do not."""
    path = write(('revision = "abc"\n', ""))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    first, second = (make_plan(load_recipe(path, [f'verifier.model="./{name}"']), llama) for name in ("one", "two"))
    assert changed(first, second) == []
    (tmp_path / "two" / "tokenizer.json").write_text('{"changed": 1}')
    third = make_plan(load_recipe(path, ['verifier.model="./two"']), llama)
    assert third.stage("verifier").fingerprint != first.stage("verifier").fingerprint


def test_all_problems_across_sections_come_together(write: Write, llama: VerifierFacts) -> None:
    """Vocabulary, layers, positions and steps are checked in one go, each with file and line."""
    problems = refusals(
        write(),
        llama,
        "algorithm.draft_vocab_size=200_000",
        "algorithm.target_layer_ids=[2, 16, 33]",
        "algorithm.decoder={rope_theta=1.0}",
        "data.max_tokens=200_000",
        "schedule.row_tokens=1024",
    )
    assert set(problems) == {
        "algorithm.draft_vocab_size",
        "algorithm.target_layer_ids",
        "algorithm.decoder.rope_theta",
        "data.max_tokens",
        "schedule.row_tokens",
    }
    assert "at most the verifier's vocabulary of 128256, got 200000" in problems["algorithm.draft_vocab_size"]
    assert "0..32" in problems["algorithm.target_layer_ids"]
    in_file = refusals(write(("draft_vocab_size = 64", "draft_vocab_size = 200_000")), llama)
    assert in_file["algorithm.draft_vocab_size"].startswith("mine.toml:15: algorithm.draft_vocab_size: must be at most")


def test_steps_must_divide_into_rows_and_rows_among_processes(write: Write, llama: VerifierFacts) -> None:
    """The message names numbers that would work."""
    path = write()
    assert "use 768 or 1024" in refusals(path, llama, "schedule.tokens_per_step=1000")["schedule.tokens_per_step"]
    shared = refusals(path, llama, world_size=3)["schedule.tokens_per_step"]
    assert "4 rows per step cannot be divided among 3 processes" in shared
    assert "multiple of 768" in shared
    assert make_plan(load_recipe(path), llama, world_size=4).rows_per_step == 4


def test_files_that_are_not_there_are_named(write: Write, llama: VerifierFacts, tmp_path: Path) -> None:
    """Missing data, suites and local verifiers are reported before anything runs."""
    path = write(('revision = "abc"\n', ""))
    problems = refusals(
        path,
        llama,
        'data.sources=[{path="lost.jsonl"}]',
        'verifier.model="./nowhere"',
        'benchmark.suites=[{name="own", path="gone.jsonl"}, "mt_bensh"]',
    )
    assert set(problems) == {
        "data.sources[0].path",
        "verifier.model",
        "benchmark.suites[0].path",
        "benchmark.suites[1]",
    }
    assert str(tmp_path / "lost.jsonl") in problems["data.sources[0].path"]
    assert "no such file" in refusals(path, llama, 'verifier.model="lost.gguf"')["verifier.model"]


def test_a_data_file_with_another_sha256_is_refused(write: Write, llama: VerifierFacts) -> None:
    """A recipe that names a hash gets a file with that hash, or an error."""
    override = f"data.sources=[{{path='rows.jsonl', sha256='{'0' * 64}'}}]"
    assert "does not match the file" in refusals(write(), llama, override)["data.sources[0].sha256"]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ('"held/K=4/T=0" = {tau=[1.0, 2.0], source="x"}', "is not a setting that [benchmark] measures"),
        ('"other/K=3/T=0" = {tau=[1.0, 2.0], source="x"}', "is not a setting that [benchmark] measures"),
        ('"held" = {tau=[1.0, 2.0], source="x"}', "write SUITE/K=5/T=0"),
        ('"held/K=3/T=0" = {tau=[3.0, 5.0], source="x"}', "at most K + 1 = 4"),
    ],
)
def test_a_band_must_name_a_setting_that_is_measured(
    write: Write, llama: VerifierFacts, setting: str, text: str
) -> None:
    """A band for another K, suite or temperature could never be checked; a band above K + 1 could never be reached."""
    (problem,) = refusals(write(), llama, f"expect={{{setting}}}").values()
    assert text in problem


@pytest.mark.parametrize(
    ("algorithm", "most", "mend"),
    [
        (
            'name="medusa"',
            "at most 5, the limit of medusa with num_heads = 5; got [6, 9]",
            "algorithm.num_heads",
        ),
        (
            'name="dflash", block_size=6',
            "at most 5, the limit of dflash with block_size = 6; got [6, 9]",
            "block_size",
        ),
        (
            'name="dflash", block_size=6, sample_from_anchor=true',
            "at most 6, the limit of dflash",
            "algorithm.block_size",
        ),
        (
            'name="dspark", block_size=6',
            "at most 6, the limit of dspark with block_size = 6; got [9]",
            "block_size",
        ),
    ],
)
def test_more_drafts_than_an_algorithm_has_are_refused(
    write: Write, llama: VerifierFacts, algorithm: str, most: str, mend: str
) -> None:
    """Results would be reported for K but come from fewer drafts; without a benchmark there are none."""
    overrides = [f"algorithm={{{algorithm}}}", "benchmark.num_speculative_tokens=[5, 6, 9]"]
    (problem,) = refusals(write(), llama, *overrides).values()
    assert most in problem
    assert mend in problem
    assert make_plan(load_recipe(write(), [*overrides, "benchmark.suites=[]"]), llama)
    assert make_plan(load_recipe(write(), [overrides[0], "benchmark.num_speculative_tokens=[5]"]), llama)


@pytest.mark.parametrize(
    ("algorithm", "field", "text"),
    [
        ('name="dflash", mask_token_id=128256', "mask_token_id", "a token of the verifier, 0 to 128255, got 128256"),
        ('name="dspark", mask_token_id=128256', "mask_token_id", "a token of the verifier"),
        ('name="peagle", mask_token_id=128256', "mask_token_id", "a token of the verifier"),
        ('name="mtp", draft_vocab_size=8192', "draft_vocab_size", "the verifier's 128256"),
    ],
)
def test_what_an_algorithm_cannot_do_with_a_verifier_is_refused(
    write: Write, llama: VerifierFacts, algorithm: str, field: str, text: str
) -> None:
    """The algorithm's own config checks it, before any weights are loaded."""
    problems = refusals(write(), llama, f"algorithm={{{algorithm}}}")
    assert list(problems) == [f"algorithm.{field}"]
    assert text in problems[f"algorithm.{field}"]


def test_a_config_of_another_kind_of_model_is_refused(write: Write) -> None:
    """The file and the missing keys are named."""
    problems = refusals(write(), VerifierFacts({"model_type": "vit"}, "vit/config.json"))
    assert "vit/config.json has no vocab_size" in problems["verifier.model"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_plans(name: str, tmp_path: Path) -> None:
    """Each recipe of the catalogue plans from its verifier's config.json; each band names the seeds behind it."""
    recipe = load_recipe(name)
    plan = make_plan(recipe, facts_of(recipe, tmp_path), world_size=1)
    assert recipe.name == name
    assert plan.stages[-1].name == "bench"
    assert all("seed" in band.source for band in recipe.expect.values())


def test_the_recipes_for_eight_gpus_plan_for_eight_processes(llama: VerifierFacts, qwen: VerifierFacts) -> None:
    """Eight processes share the rows of a step."""
    for name, facts in (("eagle3_llama8b", llama), ("eagle3_qwen3_8b", qwen)):
        plan = make_plan(load_recipe(name), facts, world_size=8)
        assert plan.rows_per_step == 16
        assert plan.draft_vocab_size == 32_000
