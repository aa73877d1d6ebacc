"""The file of an ablation: every mistake at once, with its line and the name of the variant, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.ablation.arms import load_arms
from speculators.ablation.document import load_ablation
from speculators.ablation.runs import plan_runs
from speculators.errors import RecipeError
from speculators.runs.places import Places


def problems(text: str, folder: Path) -> list[tuple[int | None, str]]:
    """Loads and plans the file, and lists (line, everything else) of each problem."""
    file = folder / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as raised:
        plan_runs(load_arms(load_ablation(str(file))))
    assert {Path(problem.file or "").name for problem in raised.value.problems} <= {"mine.toml", "smoke.toml"}
    return [(each.line, f"{each.path}: {each.message} ({each.hint})") for each in raised.value.problems]


def test_every_mistake_of_the_file_itself_is_reported_at_once(tmp_path: Path) -> None:
    """Types, unknown keys, repeated seeds, and names and lists that cannot be variants, each with its line."""
    text = (
        'format = 2\nrecipe = 3\nseeds = [0, 0]\nsettings = "a"\nsetting = "mine"\nset = "x"\n'
        '[variants]\n"a" = ["x", 3]\n'
    )
    lines = problems(text, tmp_path)
    assert [line for line, _ in lines] == [1, 2, 3, 4, 5, 6, 8]
    texts = "\n".join(message for _, message in lines)
    for part in (
        "format: must be 1",
        "recipe: must be a string, got 3",
        "one or more distinct values, got [0, 0]",
        "did you mean 'setting'?",
        'must be "SUITE/K=5/T=0", got "mine"',
        "set: must be a list of strings",
        "variants.a[1]: must be a string, got 3",
    ):
        assert part in texts
    for variants in ("", "base = ['seed=1']\n", "a = []\n", '"a|b" = ["seed=1"]\n'):
        assert problems(f'format = 1\nrecipe = "smoke"\n[variants]\n{variants}', tmp_path)


def test_every_mistake_of_every_variant_is_reported_at_once(tmp_path: Path) -> None:
    """Each names its variant and its key: misspelt, out of range, not TOML, and what would change the measurement."""
    text = """format = 1
recipe = "smoke"
set = ["schedule.max_steps=2"]
[variants]
"fine" = ["algorithm.ttt_steps=1"]
"typo" = ["algorithm.ttt_step=4", "schedule.epochs=0"]
"text" = ["algorithm.name=medusa"]
"seed" = ["seed=3"]
"other" = ['verifier.model="tiny:1"', "benchmark.max_new_tokens=20"]
"k" = ["benchmark.num_speculative_tokens=[1]"]
"rows" = ["schedule.tokens_per_step=1000"]
"""
    lines = problems(text, tmp_path)
    assert [line for line, _ in lines] == [6, 6, 7, 8, 9, 9, 10, 11]
    for (_, message), parts in zip(
        lines,
        (
            ("variants.typo: algorithm.ttt_step", "did you mean 'ttt_steps'?"),
            ("variants.typo: schedule.epochs: must be > 0",),
            ("variants.text: --set algorithm.name=medusa", "needs quotes"),
            ("variants.seed: seed", "list them in seeds"),
            ("variants.other: benchmark.max_new_tokens",),
            ("variants.other: verifier",),
            ("variants.k: benchmark: must measure quickstart/K=3/T=0",),
            ("variants.rows: schedule.tokens_per_step", "or 1024"),
        ),
        strict=True,
    ):
        assert all(part in message for part in parts), message


def test_a_mistake_of_the_base_is_reported_once(tmp_path: Path) -> None:
    """Every variant shares it; what a variant adds is reported beside it."""
    text = (
        'format = 1\nrecipe = "smoke"\nset = ["schedule.max_steps=0"]\n'
        '[variants]\na = ["algorithm.ttt_steps=1"]\nb = ["algorithm.ttt_steps=0"]\n'
    )
    (line, shared), (other, own) = problems(text, tmp_path)
    assert (line, other) == (3, 6)
    assert shared.startswith("set: schedule.max_steps: must be > 0")
    assert own.startswith("variants.b: algorithm.ttt_steps: must be > 0")


def test_a_setting_must_be_one_that_the_base_measures(tmp_path: Path) -> None:
    """The message lists what there is; the default is the first suite at its largest K."""
    text = 'format = 1\nrecipe = "smoke"\nsetting = "quickstart/K=2/T=0"\n[variants]\na = ["algorithm.ttt_steps=1"]\n'
    ((line, message),) = problems(text, tmp_path)
    assert (line, "did you mean 'quickstart/K=" in message) == (3, True)
    (tmp_path / "mine.toml").write_text(text.replace("K=2/T=0", "K=1/T=0.0"))
    assert load_arms(load_ablation(str(tmp_path / "mine.toml"))).setting == "quickstart/K=1/T=0"


def test_variants_that_train_the_same_are_refused(tmp_path: Path, cache: Path) -> None:
    """As the base, or as another variant: values that no training reads make no difference."""
    text = """format = 1
recipe = "smoke"
[variants]
"as base" = ["algorithm.ttt_steps=3", "schedule.checkpoint_every=2"]
"1" = ["algorithm.ttt_steps=1"]
"one" = ["algorithm.ttt_steps=1", "distributed.shard=false"]
"layers" = ["algorithm.target_layer_ids=[1, 2, 9]"]
"""
    lines = problems(text, tmp_path)
    assert [(line, message.split(" (")[0]) for line, message in lines[:2]] == [
        (4, "variants.\"as base\": trains exactly what 'base' trains"),
        (6, "variants.one: trains exactly what '1' trains"),
    ]
    assert lines[2][0] == 7
    assert "algorithm.target_layer_ids: must be in 0..4" in lines[2][1]


def test_paths_start_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe, and files that variants name, lie beside the file, wherever the command is given."""
    (tmp_path / "lab").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("lab/rows.jsonl").write_text('{"messages": []}\n')
    base = 'format = 1\nname = "near"\nversion = "1.0.0"\nextends = "smoke"\n'
    Path("lab/near.toml").write_text(base)
    text = 'format = 1\nrecipe = "./near.toml"\n[variants]\nmine = ["data.sources=[{path=\'rows.jsonl\'}]"]\n'
    Path("lab/mine.toml").write_text(text)
    base_arm, mine = load_arms(load_ablation("lab/mine.toml", seeds=[4])).arms
    assert base_arm.recipe.name == "near"
    assert mine.recipes[4].data.sources[0].path == str(tmp_path / "lab" / "rows.jsonl")
    assert mine.recipes[4].seed == 4
    runs = plan_runs(load_arms(load_ablation("lab/mine.toml", seeds=[4])))
    line = runs[1].command("smoke", Path("lab"), Places(runs=Path("runs")))
    assert line.startswith(f"cd {tmp_path / 'lab'} && spec run smoke --runs {tmp_path / 'runs'} --set ")
    assert runs[1].command("smoke", Path(), Places(runs=Path("runs"))).startswith("spec run smoke ")


def test_an_ablation_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """A name is looked up among those that ship; a path must be a file."""
    for name, part in (("quickstrat", "did you mean 'quickstart'?"), ("./none.toml", "no such file"), ("./", "folder")):
        with pytest.raises(RecipeError, match=r"no ablation|no such file|folder") as raised:
            load_ablation(name)
        assert part in str(raised.value)


def test_the_shipped_ablation_plans() -> None:
    """Every variant of the quickstart differs from the base and from the others, and one setting decides."""
    contest = load_arms(load_ablation("quickstart"))
    assert contest.setting == "quickstart/K=5/T=0"
    assert len(contest.arms) >= 9
    runs = plan_runs(contest)
    assert len({run.plan.run_name for run in runs}) == len(contest.arms) * len(contest.seeds)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
