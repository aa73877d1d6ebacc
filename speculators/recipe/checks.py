"""Checks a recipe across its sections and against its verifier; each check returns every problem it finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from speculators.config import SpeculatorModelConfig
from speculators.errors import DataError, Problem, RecipeError, VerifierError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import resolved_suite, suite_names
from speculators.recipe.decoder import draft_decoder_config, wrong_values
from speculators.recipe.expect import band_key, setting_key
from speculators.recipe.input_sections import DataSource, is_data_path
from speculators.recipe.schema import BenchmarkSection, Recipe, Suite
from speculators.recipe.source_files import is_whole_file, locate_files
from speculators.registry import near_miss


def check_recipe(recipe: Recipe, *, world_size: int = 1) -> list[Problem]:
    """Checks everything that needs no verifier: files, steps, suites, numbers of drafts, bands."""
    return [
        *_files(recipe),
        *_steps(recipe, world_size),
        *_sharing(recipe),
        *_store(recipe),
        *_suites(recipe),
        *_drafts(recipe),
        *_bands(recipe),
    ]


def too_many_drafts(config: SpeculatorModelConfig, numbers: Sequence[int]) -> str:
    """Describes the numbers of drafted tokens (K) that exceed what the algorithm drafts per round; "" if none does.

    They would be reported as results for K, but come from fewer drafts.
    """
    limit = config.max_drafts()
    above = [number for number in numbers if limit is not None and number > limit[0]]
    if limit is None or not above:
        return ""
    most, field = limit
    setting = f"{field} = {getattr(config, field)}"
    return f"must be at most {most}, the limit of {config.speculators_model_type} with {setting}; got {above}"


def tree_depths(section: BenchmarkSection) -> list[int]:
    """Lists the depths of the trees of `[benchmark]`, each drafted by a round as deep as that."""
    return [shape.depth_within(max(section.num_speculative_tokens, default=0)) for shape in section.tree_shapes]


def check_verifier(recipe: Recipe, facts: VerifierFacts) -> list[Problem]:
    """Checks a recipe against its verifier: vocabulary, layers, positions, decoder."""
    try:
        return _verifier_problems(recipe, facts)
    except VerifierError as error:
        # transformers rejects the config.json of which a value was asked.
        message, _, hint = str(error).partition("\n")
        return [recipe.problem("verifier.model", message, hint)]


def _verifier_problems(recipe: Recipe, facts: VerifierFacts) -> list[Problem]:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
    if missing := [key for key in needed if not isinstance(facts.get(key), int)]:
        message = f"{facts.source} has no {', '.join(missing)}: this is not the config.json of a language model"
        return [recipe.problem("verifier.model", message)]
    problems = []
    config = recipe.algorithm.config
    if config.draft_vocab_size is not None and config.draft_vocab_size > facts.vocab_size:
        message = f"must be at most the verifier's vocabulary of {facts.vocab_size}, got {config.draft_vocab_size}"
        problems.append(recipe.problem("algorithm.draft_vocab_size", message, "leave it out for the whole vocabulary"))
    problems += [recipe.problem(f"algorithm.{field}", *texts) for field, *texts in config.misfits(facts)]
    layers = facts.num_hidden_layers
    if above := [layer for layer in config.target_layer_ids or () if layer > layers]:
        message = f"must be in 0..{layers}, because the verifier has {layers} layers; got {above}"
        problems.append(recipe.problem("algorithm.target_layer_ids", message))
    if recipe.data.max_tokens > facts.max_position_embeddings:
        message = f"must be at most {facts.max_position_embeddings}, the verifier's number of positions"
        problems.append(recipe.problem("data.max_tokens", f"{message}; got {recipe.data.max_tokens}"))
    try:
        draft_decoder_config(facts, config)
    except RecipeError as error:
        problems += [recipe.problem(p.path, p.message, p.hint) for p in error.problems]
    return problems


def check_decoder(recipe: Recipe) -> list[Problem]:
    """Checks the values of `algorithm.decoder` that no verifier allows; `check_verifier` includes this."""
    return [recipe.problem(p.path, p.message, p.hint) for p in wrong_values(recipe.algorithm.config.decoder)]


def _files(recipe: Recipe) -> list[Problem]:
    problems = []
    model = Path(recipe.verifier.model)
    if recipe.verifier.kind == "gguf" and not model.is_file():
        problems.append(recipe.problem("verifier.model", f"no such file: {model}"))
    if recipe.verifier.kind == "folder" and not (model / "config.json").is_file():
        message = "no config.json in this folder" if model.is_dir() else "no such folder"
        hint = "a hub id is written owner/name, without ./"
        problems.append(recipe.problem("verifier.model", f"{message}: {model}", hint))
    if (start := recipe.algorithm.config.init_from) is not None:
        hint = "name a speculator's folder, such as RUN/speculator; spec import makes one from a published checkpoint"
        absent = [name for name in ("config.json", "model.safetensors") if not (Path(start) / name).is_file()]
        problems += [recipe.problem("algorithm.init_from", f"no {name} in {start}", hint) for name in absent]
    if (template := recipe.verifier.chat_template) is not None and not Path(template).is_file():
        problems.append(recipe.problem("verifier.chat_template", f"no such file: {template}"))
    for index, source in enumerate(recipe.data.sources):
        problems += [
            recipe.problem(f"data.sources[{index}].{key}", *texts)
            for key, *texts in _source(source, answers=recipe.data.regenerate is not None)
        ]
    return problems


def _source(source: DataSource, *, answers: bool) -> Iterator[tuple[str, str, str]]:
    """Yields the key, message and hint of each problem of a source; `answers`: the verifier writes the answers."""
    if source.is_local:
        if fault := _without_files(source.path, source.split):
            yield "path", *fault
            return
        if source.revision is not None:
            yield "revision", "is for data sets of the hub, not for files", 'set it to "none"'
        if source.subset is not None:
            yield "subset", "is for data sets of the hub; rows of files are chosen by split", 'set it to "none"'
        if source.sha256 is not None and not is_whole_file(Path(source.path)):
            yield "sha256", "is for one file, not for several: the lock has the hash of each", 'set it to "none"'
    elif source.sha256 is not None:
        yield "sha256", "is for files; a data set is pinned by its revision", 'set it to "none"'
    if source.map is not None:
        mapped = source.map.present()
        if answers and "text" in mapped:
            yield "map.text", "has no prompt that the verifier could answer", "leave out data.regenerate"
        if not answers and "prompt" in mapped and "completion" not in mapped:
            hint = "name the field of the answers, or let [data.regenerate] write them"
            yield "map.prompt", "needs completion beside it: without answers there is nothing to train on", hint


def _steps(recipe: Recipe, world_size: int) -> list[Problem]:
    schedule = recipe.schedule
    row = recipe.row_tokens
    if row < recipe.data.max_tokens:
        message = f"must be at least data.max_tokens = {recipe.data.max_tokens}: a conversation is never split"
        return [recipe.problem("schedule.row_tokens", f"{message}; got {row}")]
    rows, rest = divmod(schedule.tokens_per_step, row)
    if rest:
        message = f"must be a multiple of the row length, {row} tokens; got {schedule.tokens_per_step}"
        near = " or ".join(str(row * count) for count in (rows, rows + 1) if count)
        return [recipe.problem("schedule.tokens_per_step", message, f"use {near}")]
    if rows % world_size:
        message = f"{rows} rows per step cannot be divided among {world_size} processes"
        hint = f"use a multiple of {row * world_size}, or another number of processes"
        return [recipe.problem("schedule.tokens_per_step", message, hint)]
    return []


def _sharing(recipe: Recipe) -> list[Problem]:
    """Checks that processes compute with a sharded verifier only where they do so together."""
    if not recipe.distributed.shard_verifier or not recipe.data.online:
        return []
    message = 'cannot be combined with data.hidden_states = "online"'
    hint = 'set "cached": all processes compute the states together, before training'
    return [recipe.problem("distributed.shard_verifier", message, hint)]


def _store(recipe: Recipe) -> list[Problem]:
    """Checks that a recipe with `data.store` reads stored states."""
    if recipe.data.store is None or recipe.data.stored:
        return []
    message = f'is read only where states are stored, not with data.hidden_states = "{recipe.data.hidden_states}"'
    return [recipe.problem("data.store", message, 'set data.hidden_states = "cached", or data.store = "none"')]


def _suites(recipe: Recipe) -> list[Problem]:
    problems = []
    for index, suite in enumerate(recipe.benchmark.suites):
        place = f"benchmark.suites[{index}]"
        if fault := suite_fault(suite):
            problems.append(recipe.problem(place if suite.path is None else f"{place}.path", *fault))
    return problems


def suite_fault(suite: Suite) -> tuple[str, str] | None:
    """Finds why a suite cannot be read, with the remedy; None if nothing on this machine speaks against it."""
    names = suite_names()
    if suite.path is None and suite.name not in names:
        hint = near_miss(suite.name, names) or f"available: {', '.join(names)}; a suite of your own needs a path"
        return f"no suite {suite.name!r}", hint
    try:
        whole = resolved_suite(suite)
    except RecipeError as error:
        return "; ".join(map(str, error.problems)), "recipes/README.md, [benchmark], shows a suite's file"
    if whole.map is not None and whole.map.text is not None:
        return f"suite {suite.name}: map.text has no question to answer", "name the field of the questions: map.prompt"
    return _without_files(str(whole.path), whole.split)


def _without_files(path: str, split: str | None) -> tuple[str, str] | None:
    """Describes why a local path names no readable file; None if it does, or if it is a hub id."""
    if not is_data_path(path):
        return None
    try:
        locate_files(Path(path).expanduser(), split)
    except DataError as error:
        message, _, hint = str(error).partition("\n")
        return message, hint
    return None


def _drafts(recipe: Recipe) -> list[Problem]:
    config, section = recipe.algorithm.config, recipe.benchmark
    _, field = config.max_drafts() or (0, "")
    drafted = {"num_speculative_tokens": section.num_speculative_tokens, "trees": tree_depths(section)}
    return [
        recipe.problem(f"benchmark.{key}", message, f"use smaller values, or a larger algorithm.{field}")
        for key, numbers in drafted.items()
        if section.suites and (message := too_many_drafts(config, numbers))
    ]


def _bands(recipe: Recipe) -> list[Problem]:
    """Checks that each band names a setting that the benchmark measures, and values that it can reach."""
    bench = recipe.benchmark
    if bench.temperature == "model":
        return []  # the plan, which knows the numbers, checks them
    settings = {
        setting_key(suite.name, k, t): k
        for suite in bench.suites
        for k in bench.num_speculative_tokens
        for t in bench.temperatures
    }
    problems = []
    for name, band in recipe.expect.items():
        key, place = band_key(name), f'expect."{name}"'
        if key not in settings:
            message = "is not a setting that [benchmark] measures"
            hint = near_miss(key, list(settings)) or "write SUITE/K=5/T=0, with values of [benchmark]"
            problems.append(recipe.problem(place, message, hint))
        elif band.tau[1] > settings[key] + 1:
            message = f"must be at most K + 1 = {settings[key] + 1}, got {list(band.tau)}"
            problems.append(recipe.problem(f"{place}.tau", message))
    return problems
