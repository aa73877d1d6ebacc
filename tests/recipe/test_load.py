"""Loading: one report of all problems, overrides, one level of extends, origins, paths."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from speculators.config import CONFIGS
from speculators.errors import Problem, RecipeError
from speculators.recipe.load import load_recipe
from speculators.recipe.values import flatten

Write = Callable[..., str]


def problems_of(path: str, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return list(caught.value.problems)


def test_a_recipe_loads_with_its_defaults(write: Write) -> None:
    """Written values are kept; the rest has the defaults of the schema."""
    recipe = load_recipe(write())
    assert (recipe.name, recipe.seed, recipe.verifier.dtype) == ("mine", 0, "bfloat16")
    assert recipe.schedule.optimizer.lr == 1e-3
    assert recipe.algorithm.config.draft_vocab_size == 64
    assert recipe.benchmark.temperature == (0.0,)
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301


def test_all_problems_come_together_with_file_line_path_and_near_miss(write: Write) -> None:
    """Each problem says where, what was found, what is allowed, and what was probably meant."""
    path = write(
        ('revision = "abc"', 'revison = "abc"'),
        ("max_tokens = 256", 'max_tokens = "256"'),
        ("draft_vocab_size = 64", "draft_vocab_size = 64\nttt_step = 3"),
        ("lr = 1e-3", "lr = -1e-3"),
        ("num_speculative_tokens = [3, 5]", 'num_speculative_tokens = "35"'),
    )
    assert [str(problem) for problem in problems_of(path)] == [
        "mine.toml:7: verifier.revison: unknown key 'revison' (did you mean 'revision'?)",
        'mine.toml:11: data.max_tokens: must be an integer, got "256"',
        "mine.toml:16: algorithm.ttt_step: unknown key 'ttt_step' (did you mean 'ttt_steps'?)",
        "mine.toml:20: schedule.optimizer.lr: must be > 0, got -0.001",
        'mine.toml:24: benchmark.num_speculative_tokens: must be a list of integers, got "35"',
    ]


def test_a_missing_key_is_reported_at_the_table_that_lacks_it(write: Write) -> None:
    """With the line of the table for a missing key, and without one for a missing table."""
    (model,) = problems_of(write(('model = "owner/model"\n', "")))
    assert (model.path, model.line) == ("verifier.model", 5)
    (table,) = problems_of(write(('[verifier]\nmodel = "owner/model"\nrevision = "abc"\n', "")))
    assert (table.path, table.message) == ("verifier", "is missing; it must be a table")


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(write: Write) -> None:
    """A key without a near miss in its section is looked up in the whole schema, including the algorithm's own keys."""
    (first,) = problems_of(write(('version = "1.0.0"', 'version = "1.0.0"\nlr = 1')))
    assert first.hint == "did you mean 'schedule.optimizer.lr'?"
    (second,) = problems_of(write(("tokens_per_step = 1024", "tokens_per_step = 1024\nttt_gamma = 0.8")))
    assert second.hint == "did you mean 'algorithm.ttt_gamma'?"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"name = ", "is not TOML"),
        (b"\xff\xfe\x00binary", "is not a text file"),
        (b"a = 1\nb = [1,,2]\n", "is not TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_one_clear_problem(write: Write, content: bytes, text: str) -> None:
    """Broken and binary files are named, with the line if tomli knows it."""
    path = write()
    Path(path).write_bytes(content)
    (problem,) = problems_of(path)
    assert text in problem.message
    assert problem.file == "mine.toml"
    assert problem.line == (2 if content.startswith(b"a") else problem.line)


def test_set_replaces_values_in_toml(write: Write) -> None:
    """Numbers, texts, truth values, lists and tables of TOML; a table is merged, a list replaced."""
    recipe = load_recipe(
        write(),
        [
            "schedule.optimizer.lr=3e-4",
            'schedule.learning_rate = { shape = "linear" }',
            "benchmark.num_speculative_tokens=[7]",
            "algorithm.ttt_steps=5",
            "distributed.shard=false",
            'schedule.optimizer.clip_norm="none"',
        ],
    )
    assert (recipe.schedule.optimizer.lr, recipe.schedule.optimizer.name) == (3e-4, "adamw")
    assert recipe.schedule.learning_rate.shape == "linear"
    assert recipe.benchmark.num_speculative_tokens == (7,)
    assert recipe.algorithm.config.ttt_steps == 5
    assert recipe.distributed.shard is False
    assert recipe.schedule.optimizer.clip_norm is None


def test_a_wrong_set_gets_a_near_miss_and_no_file(write: Write) -> None:
    """A key that does not exist gets the closest one that does."""
    path = write()
    (misspelt,) = problems_of(path, "schedule.optimiser.lr=3e-4")
    assert (misspelt.path, misspelt.hint) == ("schedule.optimiser", "did you mean 'optimizer'?")
    assert misspelt.file is None
    (elsewhere,) = problems_of(path, "optimizer.lr=3e-4")
    assert elsewhere.hint == "did you mean 'schedule.optimizer'?"
    (typed,) = problems_of(path, "algorithm.ttt_steps=0")
    assert (typed.path, typed.message) == ("algorithm.ttt_steps", "must be > 0, got 0")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("verifier.model=./folder", "--set 'verifier.model=\"./folder\"'"),
        ("schedule.epochs", "write section.key=value"),
        ("data.sources[0].take=3", "a list is replaced as a whole"),
    ],
)
def test_a_set_that_is_not_toml_says_how_to_write_it(write: Write, override: str, hint: str) -> None:
    """A forgotten quote, a missing value and an index each get their own advice."""
    (problem,) = problems_of(write(), override)
    assert "is not TOML" in problem.message
    assert hint in problem.hint


def test_origins_say_where_each_value_was_written(write: Write) -> None:
    """File and line, the extended file, the command line, or the default."""
    base = write(name="base.toml")
    text = 'format = 1\nname = "child"\nversion = "1.0.0"\nextends = "base.toml"\n\n[data]\nmax_tokens = 128\n'
    child = write(name="child.toml", text=text)
    where = {path: str(origin) for path, origin in load_recipe(child, ["schedule.epochs=3"]).origins.items()}
    assert where["data.max_tokens"] == "child.toml:7"
    assert where["verifier.model"] == "extends base.toml:6"
    assert where["schedule.optimizer.lr"] == "extends base.toml:19"
    assert where["schedule.epochs"] == "--set"
    assert where["seed"] == "default"
    assert where.keys() == flatten(load_recipe(child)).keys()
    assert base == "./base.toml"


def test_extends_takes_everything_but_identity_and_bands(write: Write) -> None:
    """A child has its own name and version, and no band that was measured with its base."""
    band = '\n[expect]\n"held/K=3/T=0" = { tau = [1.0, 2.0], source = "a run" }\n'
    write(("[verifier]", 'summary = "the base"\n[verifier]'), name="base.toml")
    Path("base.toml").write_text(Path("base.toml").read_text() + band)
    child = write(name="child.toml", text='format = 1\nname = "child"\nversion = "2.0.0"\nextends = "./base.toml"\n')
    recipe = load_recipe(child)
    assert (recipe.name, recipe.version, recipe.summary, recipe.expect) == ("child", "2.0.0", "", {})
    assert recipe.data.max_tokens == 256
    nameless = write(name="nameless.toml", text='format = 1\nextends = "base.toml"\n')
    assert {problem.path for problem in problems_of(nameless)} == {"name", "version"}


def test_extends_is_one_level_deep(write: Write) -> None:
    """A base that itself extends is refused, with what to extend instead; so is a missing base."""
    write(name="base.toml")
    head = 'format = 1\nname = "x"\nversion = "1.0.0"\n'
    write(name="child.toml", text=head + 'extends = "base.toml"\n')
    (problem,) = problems_of(write(name="grandchild.toml", text=head + 'extends = "child.toml"\n'))
    assert (problem.path, problem.line) == ("extends", 4)
    assert "one level" in problem.message
    assert "'base.toml'" in problem.hint
    (missing,) = problems_of(write(name="lost.toml", text=head + 'extends = "nowhere.toml"\n'))
    assert (missing.path, missing.file, missing.line) == ("extends", "lost.toml", 4)


def test_another_algorithm_starts_from_an_empty_table(write: Write, registry: None) -> None:
    """The keys of the base's algorithm are not those of another one, so they are not inherited."""
    from speculators.config import SpeculatorModelConfig

    @SpeculatorModelConfig.register("other_algorithm")
    class OtherConfig(SpeculatorModelConfig):
        speculators_model_type: str = "other_algorithm"
        block_size: int = 8

    recipe = load_recipe(
        write(("draft_vocab_size", "ttt_steps = 2\ndraft_vocab_size")), ['algorithm.name="other_algorithm"']
    )
    assert isinstance(recipe.algorithm.config, OtherConfig)
    assert recipe.algorithm.config.draft_vocab_size is None


PLUGIN = """
from speculators.config import SpeculatorModelConfig

@SpeculatorModelConfig.register("plugged")
class PluggedConfig(SpeculatorModelConfig):
    speculators_model_type: str = "plugged"
    block_size: int = 8
    ratios: tuple[float, ...] = (0.5,)
"""


def test_a_plug_in_is_imported_first_and_its_keys_are_checked(write: Write, registry: None) -> None:
    """`algorithm.module` beside the recipe registers an algorithm whose own fields validate like built-in ones."""
    Path("plugged_algo.py").write_text(PLUGIN)
    changes = (
        ('name = "eagle3"', 'name = "plugged"\nmodule = "plugged_algo"'),
        ("draft_vocab_size = 64", "block_size = 16"),
    )
    recipe = load_recipe(write(*changes))
    assert recipe.algorithm.config.block_size == 16
    (problem,) = problems_of(write(*changes[:1], ("draft_vocab_size = 64", "blok_size = 16")))
    assert str(problem).endswith("algorithm.blok_size: unknown key 'blok_size' (did you mean 'block_size'?)")
    (typed,) = problems_of(write(*changes), 'algorithm.ratios=["a"]')
    assert typed.path == "algorithm.ratios[0]"


def test_a_plug_in_that_fails_is_one_problem(write: Write, registry: None) -> None:
    """A module that is missing or raises is reported at algorithm.module, without a second problem for the name."""
    (missing,) = problems_of(write(('name = "eagle3"', 'name = "gone"\nmodule = "no_such_module_here"')))
    assert missing.path == "algorithm.module"
    assert "No module named" in missing.message
    Path("broken_algo.py").write_text("raise RuntimeError('boom')")
    (broken,) = problems_of(write(('name = "eagle3"', 'name = "gone"\nmodule = "broken_algo"')))
    assert "RuntimeError: boom" in broken.message


def test_an_unknown_algorithm_lists_the_known_ones(write: Write) -> None:
    """The name is refused with the registered names and the near miss."""
    (problem,) = problems_of(write(('name = "eagle3"', 'name = "eagel3"')))
    assert problem.path == "algorithm.name"
    assert "eagle3" in problem.message
    assert problem.hint == "did you mean 'eagle3'?"


def test_derived_config_fields_are_not_keys_of_a_recipe(write: Write) -> None:
    """Fields that the build fills in (the decoder's config, the layout version) cannot be set by hand."""
    (problem,) = problems_of(write(), 'algorithm.speculators_version="1"')
    assert "unknown key" in problem.message


def test_file_paths_are_relative_to_the_file_that_contains_them(write: Write, tmp_path: Path) -> None:
    """A recipe, a base in another folder, and --set each have their own starting point."""
    folder = tmp_path / "deep"
    folder.mkdir()
    write(name="deep/base.toml")
    (folder / "rows.jsonl").write_text("{}\n")
    text = 'format = 1\nname = "x"\nversion = "1.0.0"\nextends = "deep/base.toml"\n'
    child = write(name="child.toml", text=text)
    assert load_recipe(child).data.sources[0].path == str(folder / "rows.jsonl")
    recipe = load_recipe("deep/base.toml", ['data.sources=[{path="rows.jsonl"}]'])
    assert recipe.data.sources[0].path == str(tmp_path / "rows.jsonl")
    hub = load_recipe(child, ['data.sources=[{path="owner/set"}]'])
    assert hub.data.sources[0].path == "owner/set"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ('verifier.model="wheel:x#y.gguf"', "wheel:NAME==VERSION#path/in/wheel"),
        ('verifier={model="wheel:x==1#../y.gguf", revision="none"}', "must name a .gguf file inside the wheel"),
        ('verifier.model="tiny:x"', "tiny:SEED"),
        ('verifier.model="two text"', "a hub id"),
        ('verifier.sha256="abc"', "64 lower-case hex digits"),
        ('data.server.endpoints=["localhost:8000"]', "http://HOST:PORT"),
        ('data.server.endpoints=["http://localhost:abc"]', "http://HOST:PORT"),
        ('data.server.endpoints=["http://localhost:99999"]', "http://HOST:PORT"),
        ('data.server.endpoints=["http://[::1"]', "http://HOST:PORT"),
        ("data.server.endpoints=[]", "one or more distinct values"),
        ('data.server.endpoints="http://host:1"', "must be a list of strings"),
        ('data.server.folder=""', "must not be empty"),
        ("data.server.concurrency=0", "must be > 0"),
        ('data.store="/mnt/states"', 'the URL of a folder, such as "s3://bucket/states"'),
        ('data.store="s3://bucket/../other"', "must name one folder"),
        ('data.store="simplecache::s3://bucket"', "the URL of a folder"),
        ('data.store="zip://a::s3://bucket"', "must name one folder"),
        ('data.store="s3://key:secret@bucket/states"', "must not contain a password"),
        ('data.hidden_states="onlin"', "did you mean 'online'?"),
        ("data.sources=[]", "must not be empty"),
        ('schedule.evaluate_every="10"', 'a share of the run such as "10%"'),
        ('schedule.evaluate_every="0%"', 'a share of the run such as "10%"'),
        ("schedule.optimizer.betas=[0.9, 1.0]", "from 0 to below 1"),
        ("schedule.optimizer.adamw_lr=1e-3", 'for name = "muon"'),
        ("benchmark.num_speculative_tokens=[3, 3]", "distinct"),
        ('benchmark.baselines=["sufix"]', "did you mean 'suffix'?"),
        ('benchmark.baselines=["ngram:3"]', "nothing after a colon"),
        ('benchmark.baselines=["ngram", "draft_model"]', "needs a model"),
        ("benchmark={temperature=[1.0], top_p=1.5}", "above 0 and at most 1"),
        ("benchmark={temperature=[1.0], top_k=0}", "must be > 0"),
        ("benchmark.top_k=20", "greedy decoding does not sample"),
        ('benchmark.verification="block"', "verification: greedy decoding does not sample"),
        ("benchmark={temperature=[1.0], verification='blocks'}", "did you mean 'block'?"),
        ("benchmark={temperature='model', min_p=0.1}", 'temperature = "model" takes the verifier\'s own'),
        ("benchmark.temperature='modell'", 'a list of numbers or one of "model"'),
        ("benchmark.temperature=[-1.0]", "must be >= 0"),
        ('benchmark.baselines=["hybrid"]', "needs a look-up: hybrid:ngram or hybrid:suffix"),
        ('benchmark.baselines=["hybrid:draft_model"]', "needs a look-up"),
        ('algorithm={name="dflash", mask_token_id=-3}', "must be >= 0, got -3"),
        ('benchmark.suites=["a", "a"]', "distinct names"),
        ('expect."held/K=3/T=0"={tau=[2.0, 1.0], source="x"}', "low <= high"),
        ('name="a/b"', "letters"),
        ('version="1"', "three numbers"),
    ],
)
def test_each_field_and_section_has_its_check(write: Write, override: str, text: str) -> None:
    """The message says what is allowed."""
    assert any(text in problem.message for problem in problems_of(write(), override))


def test_the_former_key_of_a_single_server_still_works(write: Write) -> None:
    """In a file and on the command line it is a list of one server, with a note; beside the new key it is unknown."""
    old = write(("max_tokens = 256", 'max_tokens = 256\nserver.endpoint = "http://a:1"'))
    recipe = load_recipe(old)
    assert recipe.data.server.endpoints == ("http://a:1",)
    assert recipe.notes == ("mine.toml: data.server.endpoint is read as data.server.endpoints, a list of one server",)
    recipe = load_recipe(old, ['data.server.endpoint="http://b:1"'])
    assert recipe.data.server.endpoints == ("http://b:1",)
    assert [note.partition(":")[0] for note in recipe.notes] == ["mine.toml", "--set"]
    assert load_recipe(old, ['data.server.endpoints=["http://b:1", "http://c:1"]']).data.server.endpoints[1:]
    (problem,) = problems_of(old, 'data.server={endpoint="http://a:1", endpoints=["http://b:1"]}')
    assert (problem.path, problem.hint) == ("data.server.endpoint", "did you mean 'endpoints'?")


def test_a_wheel_needs_a_sha256_and_a_folder_takes_no_revision(write: Write) -> None:
    """Hashes and revisions are required where they have a meaning, and refused elsewhere."""
    path, wheel = write(), 'verifier.model="wheel:x==1#y.gguf"'
    assert "needs sha256" in problems_of(path, wheel)[0].message
    assert "revision is for hub ids" in problems_of(path, 'verifier.model="./folder"')[0].message
    assert "sha256 is for .gguf" in problems_of(path, f'verifier.sha256="{"0" * 64}"')[0].message
    recipe = load_recipe(path, [wheel, f'verifier.sha256="{"0" * 64}"', 'verifier.revision="none"'])
    assert recipe.verifier.kind == "wheel"


def test_every_field_of_the_algorithms_there_are_can_be_read_from_a_recipe() -> None:
    """No registered config has a field of a type that TOML lacks."""
    from speculators.structure.converter import build

    for name in CONFIGS.names():
        config_class = CONFIGS.get(name)
        defaults = attrs.asdict(config_class())
        keys = [field.name for field in config_class.recipe_fields()]
        assert build(config_class, {key: defaults[key] for key in keys}, keys) == config_class()
