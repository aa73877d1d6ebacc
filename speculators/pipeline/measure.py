"""Measures a speculator that is on disk, in this process or behind a running server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import BenchResult
from speculators.bench.run import bench
from speculators.bench.suites import load_suite, prompts_digest
from speculators.cpu import sharing_the_cpu
from speculators.data.template import ChatTemplate
from speculators.decoding.draft_model import pinned
from speculators.errors import ArtifactError, Problem, RecipeError, ServerError
from speculators.events import Progress
from speculators.model import SpeculatorModel, read_config
from speculators.nn.precision import place
from speculators.pipeline.bench import timed_apart
from speculators.recipe.algorithm import import_plugin
from speculators.recipe.checks import too_many_drafts, tree_depths
from speculators.recipe.fingerprint import suite_identity
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.plan import read_plan, with_own_sampling
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.runs.places import RunFolder
from speculators.servers.benchmark import Server, benchmark_server
from speculators.servers.endpoint import Endpoint
from speculators.servers.engines import ENGINES
from speculators.servers.load import Workload
from speculators.servers.result import ServedResult
from speculators.structure.converter import structure
from speculators.structure.faults import Invalid
from speculators.training.world import local_device
from speculators.verifier.engine import Engine
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import config_facts, obtain
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer

# Seeds sampling and bootstrap, as the in-process benchmark of a folder does.
SEED = 0


@attrs.frozen(kw_only=True)
class SavedSpeculator:
    """A speculator on disk that is to be measured, examined or exported.

    Attributes:
        folder: holds config.json and model.safetensors.
        recipe: of the run that the speculator lies in, from plan.json; None outside of runs.
        verifier: replaces the model of the recipe, or the one that config.json names; `@REVISION` may follow a hub id,
            `@SHA256` a GGUF file or a wheel's.
        decoding: other values for fields of config.json that only decoding reads.
    """

    folder: Path
    recipe: dict[str, Any] | None
    verifier: str | None = None
    decoding: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def run(self) -> Path | None:
        """The folder of the run that the speculator lies in; None outside of runs."""
        return None if self.recipe is None else self.folder.absolute().parent

    @property
    def name(self) -> str:
        """The name in results: that of its run, or its own path."""
        return str(self.folder) if self.run is None else self.run.name


@sharing_the_cpu()
def measure_folder(subject: SavedSpeculator, section: BenchmarkSection, *, progress: Progress) -> BenchResult:
    """Measures a speculator in this process.

    Raises:
        SpeculatorsError: speculator or verifier cannot be loaded, the algorithm lacks a hook, or drafts fewer tokens.
    """
    ks = section.num_speculative_tokens
    model, engine = load_saved(subject, ks=ks, depths=tree_depths(section), progress=progress)
    section = with_own_sampling(section, engine.facts)

    def load() -> SpeculatorModel:
        saved = SpeculatorModel.from_pretrained(subject.folder, verifier=engine.folder)
        saved.config = model.config
        return saved

    timed = timed_apart(section, engine, load, verifier_of(subject))
    result = bench(model, engine, section, name=str(subject.folder), progress=progress, timed=timed)
    if subject.run is None:
        return result
    stages = {stage["name"]: stage["inputs"] for stage in read_plan(RunFolder(subject.run).plan)["stages"]}
    notes = {suite.name: not_held_out(suite, stages["prepare"]["held_out"], subject.run) for suite in section.suites}
    return attrs.evolve(
        result,
        settings=tuple(
            attrs.evolve(setting, note="; ".join(filter(None, (setting.note, notes[setting.suite]))))
            for setting in result.settings
        ),
    )


def not_held_out(suite: Suite, held_out: Sequence[Mapping[str, Any]], run: Path) -> str:
    """Warns of a suite whose prompts a run did not keep out of its training data; "" for others.

    Args:
        held_out: identities of the suites that it did keep out.
        run: its folder.
    """
    own = suite_identity(suite)
    for other in held_out:
        # A part of what was held out is held out, too.
        whole = other["take"] is None or (own["take"] is not None and own["take"] <= other["take"])
        if whole and {**other, "take": None} == {**own, "take": None}:
            return ""
    named = f'"{suite.name}"' if suite.path is None else f'{{name="{suite.name}", path="{suite.path}"}}'
    command = f"spec data {run} --set 'benchmark.suites=[{named}]'"
    return f"{suite.name} was not kept out of the run's training data: {command} shows whether its prompts are there"


def load_saved(
    subject: SavedSpeculator, *, ks: Sequence[int] = (), depths: Sequence[int] = (), progress: Progress
) -> tuple[SpeculatorModel, Engine]:
    """Loads a speculator and its verifier on this process's device.

    Args:
        ks: numbers of tokens per round that the speculator must be able to draft; checked before anything is loaded.
        depths: of the trees that it must be able to draft, likewise.

    Raises:
        SpeculatorsError: speculator or verifier cannot be loaded, or the algorithm drafts fewer tokens.
    """
    device = local_device()
    if subject.recipe is not None:
        import_algorithm(subject.recipe["algorithm"], subject.folder.parent)
    config = decoding_otherwise(read_config(subject.folder), subject.decoding)
    if wrong := too_many_drafts(config, ks):
        raise RecipeError([Problem("benchmark.num_speculative_tokens", wrong, "--k says which are measured")])
    if wrong := too_many_drafts(config, depths):
        raise RecipeError([Problem("benchmark.trees", wrong, "--tree says which are measured, and --k how deep")])
    verifier = verifier_of(subject)
    folder = obtain(verifier, progress=progress)
    model = SpeculatorModel.from_pretrained(subject.folder, verifier=folder)
    model.config = config
    # Without a recipe nothing names the verifier's dtype: it computes in that of the speculator.
    from_recipe = subject.recipe is not None and subject.verifier is None
    engine = Engine(
        folder,
        dtype=verifier.dtype if from_recipe else str(next(model.parameters()).dtype).removeprefix("torch."),
        device=device,
        section=verifier,
    )
    return place(model, device, beside=engine.dtype), engine


def decoding_otherwise(config: Any, changes: Mapping[str, Any]) -> Any:
    """Changes fields of a config that only decoding reads; raises RecipeError for any other field."""
    known = list(type(config).decoding)
    problems = [
        Problem(f"algorithm.{name}", f"is not read by decoding alone ({', '.join(known) or 'nothing'} is)")
        for name in changes
        if name not in known
    ]
    if problems:
        raise RecipeError(problems)
    try:
        return attrs.evolve(config, **changes)
    except (ValueError, TypeError) as error:
        raise RecipeError([Problem(f"algorithm.{', '.join(changes)}", str(error))]) from None


def import_algorithm(table: dict[str, Any], folder: Path) -> None:
    """Imports the plug-in that `[algorithm]` of a run's recipe names, if any; raises ArtifactError if that fails."""
    if table["module"] is not None:
        try:
            import_plugin(table["module"], folder)
        except Invalid as invalid:
            raise ArtifactError(f"{folder}: {'; '.join(fault.message for fault in invalid.faults)}") from invalid


def verifier_of(subject: SavedSpeculator) -> VerifierSection:
    """Finds the verifier to measure a speculator with; raises ArtifactError or RecipeError if none is named."""
    table = {} if subject.recipe is None else subject.recipe["verifier"]
    recipe = {key: value for key, value in table.items() if value is not None}
    # A copy of the verifier somewhere else is asked in the same way.
    chat = {key: recipe[key] for key in ("template", "chat_template") if key in recipe}
    if recipe and subject.verifier is None:
        values = recipe
    else:
        name = subject.verifier or _configured_verifier(subject.folder)
        if name is None:
            raise ArtifactError(f"{subject.folder}/config.json names no verifier", hint="name one: --verifier MODEL")
        if not Path(name).is_dir():
            return attrs.evolve(pinned(name, "verifier"), **chat)
        values = {"model": str(Path(name).resolve()), **chat}
    section, problems = structure(values, VerifierSection, path=("verifier",))
    if section is None:
        raise RecipeError(problems)
    return section


def _configured_verifier(folder: Path) -> str | None:
    served = read_config(folder).speculators_config
    return served.verifier.name_or_path if served else None


def measure_endpoint(
    subject: SavedSpeculator,
    section: BenchmarkSection,
    *,
    engine: str,
    endpoint: Endpoint,
    baseline_endpoint: Endpoint | None = None,
    model: str | None = None,
    baseline_model: str | None = None,
    concurrency: int = 1,
    num_speculative_tokens: int | None = None,
    take: int | None = None,
    progress: Progress,
) -> ServedResult:
    """Measures a speculator on a running server, and the speed-up over a server without it.

    Args:
        engine: one of `ENGINES`.
        endpoint: the server with the speculator.
        baseline_endpoint: the server without it; None for no speed-up.
        model: the name that the server gives the model; None if it offers only one. Likewise `baseline_model`.
        concurrency: prompts under way at once.
        num_speculative_tokens: K, for servers that do not report it.
        take: use only that many prompts of each suite, the first ones; None for all.

    Raises:
        SpeculatorsError: the verifier's tokenizer or a suite cannot be obtained, or a server reports an error.
    """
    server = find_server(engine, endpoint, model)
    baseline = None
    if baseline_endpoint is not None:
        baseline = _matching(server, Server.find(engine, baseline_endpoint, baseline_model, option="--baseline-model"))
    section = with_own_sampling(section, config_facts(verifier_of(subject), progress=progress))
    settings = [
        benchmark_server(
            server,
            baseline,
            attrs.evolve(workload, temperature=temperature),
            num_speculative_tokens=num_speculative_tokens,
            progress=progress,
        )
        for workload in suite_workloads(subject, section, concurrency=concurrency, take=take, progress=progress)
        for temperature in section.temperatures
    ]
    return ServedResult(
        speculator=subject.name,
        verifier=verifier_of(subject).model,
        engine=server.engine.name,
        version=server.version,
        model=server.model,
        endpoint=server.endpoint.url,
        baseline_endpoint=None if baseline is None else baseline.endpoint.url,
        baseline_model=None if baseline is None else baseline.model,
        concurrency=concurrency,
        max_new_tokens=section.max_new_tokens,
        seed=SEED,
        settings=tuple(settings),
    )


def find_server(engine: str, endpoint: Endpoint, model: str | None) -> Server:
    """Finds a server; raises RecipeError for an unknown engine and ServerError as `Server.find`."""
    if engine not in ENGINES:
        raise RecipeError(f"no engine {engine!r} (available: {', '.join(ENGINES)})")
    return Server.find(engine, endpoint, model)


def _matching(server: Server, baseline: Server) -> Server:
    """Returns the baseline; raises ServerError if it runs another version than the server with the speculator."""
    if baseline.version != server.version:
        versions = f"{baseline.endpoint.url} runs {baseline.version}, {server.endpoint.url} {server.version}"
        message = f"{versions}: their speeds would differ for reasons other than the speculator"
        raise ServerError(message, hint="start both with one version")
    return baseline


def _tokenizer_folder(verifier: VerifierSection, progress: Progress) -> Path:
    """Obtains the verifier's tokenizer alone where that is possible: the server has the weights."""
    if verifier.kind == "hub":
        return fetch_tokenizer(verifier.model, verifier.revision, trust_remote_code=verifier.trust_remote_code)
    return obtain(verifier, progress=progress)


def suite_workloads(
    subject: SavedSpeculator, section: BenchmarkSection, *, concurrency: int, take: int | None, progress: Progress
) -> list[Workload]:
    """Makes a workload of each suite at T = 0.

    Args:
        concurrency: prompts under way at once.
        take: use only that many prompts of each suite, the first ones; None for all.

    Raises:
        SpeculatorsError: the verifier's tokenizer or a suite cannot be obtained.
    """
    verifier = verifier_of(subject)
    folder = _tokenizer_folder(verifier, progress)
    template = ChatTemplate.of(load_tokenizer(folder, verifier))
    workloads = []
    for suite in section.suites:
        prompts = load_suite(suite)
        workloads.append(
            Workload(
                suite=suite.name,
                prompts=prompts[:take],
                suite_digest=prompts_digest(prompts),
                template=template,
                max_new_tokens=section.max_new_tokens,
                stop_ids=folder_stop_ids(folder, verifier),
                seed=SEED,
                concurrency=concurrency,
                token_filter=section.token_filter,
            )
        )
    return workloads


def find_servers(engine: str, drafting: Sequence[Endpoint], plain: Endpoint) -> tuple[list[Server], Server]:
    """Finds servers with a speculator and the one without; raises ServerError unless all run one version."""
    baseline = find_server(engine, plain, None)
    servers = [find_server(engine, endpoint, None) for endpoint in drafting]
    for server in servers:
        _matching(server, baseline)
    return servers, baseline
