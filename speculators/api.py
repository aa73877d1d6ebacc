"""Recipes, runs and speculators from Python: the functions that notebooks and scripts import from `speculators`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from speculators.bench.replay import replay_each
from speculators.bench.responses import own_rows
from speculators.bench.result import Acceptance, Setting, summarize
from speculators.bench.speed import Speed
from speculators.bench.suites import Prompt
from speculators.cost.sizes import with_parameters
from speculators.cpu import sharing_the_cpu
from speculators.data.messages import Message
from speculators.data.template import ChatTemplate
from speculators.decoding.loop import Decoded, OnTokens, unheard
from speculators.decoding.loop import decode as decode_tokens
from speculators.decoding.target import CachedVerifier
from speculators.decoding.verify import verify
from speculators.errors import SpeculatorsError
from speculators.events import Listen
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel
from speculators.pipeline.measure import SavedSpeculator, load_saved
from speculators.pipeline.run import run_recipe as run_stages
from speculators.pipeline.setup import on_this_machine
from speculators.recipe import load as recipes
from speculators.recipe import plan as plans
from speculators.recipe.checks import too_many_drafts
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe
from speculators.report.progress import RunView
from speculators.runs.benches import read_benches
from speculators.runs.places import Places, RunFolder, find_run, find_speculator, recipe_of
from speculators.structure.spelling import toml_text
from speculators.training.world import start, stop
from speculators.verifier.engine import Engine
from speculators.verifier.sources import fetch_facts
from speculators.verifier.weights import load_head

if TYPE_CHECKING:
    import pandas

# A user's turn, or a conversation that ends with one: [{"role": "user", "content": "..."}].
Chat = str | Sequence[Mapping[str, str]]


@attrs.frozen(kw_only=True)
class Run:
    """A run on disk, with its measurements as typed values.

    Attributes:
        folder: the run folder.
        settings: the numbers of each suite, K and temperature that was measured in process; the newest of each.
        unread: why a file of measurements was left out, one line for each.

    Example:
        run = read_run("runs/smoke-1a2b3c4d")
        print(run.settings[0].exact.tau, run.settings[0].definition)
    """

    folder: Path
    settings: tuple[Setting, ...]
    unread: tuple[str, ...] = ()

    @property
    def speculator(self) -> Path:
        """The folder of the trained speculator: config.json and model.safetensors, as servers load them."""
        return RunFolder(self.folder).speculator

    def to_pandas(self) -> pandas.DataFrame:
        """Tabulates the measurements: a row for the speculator, each tree and each baseline in each suite, T and K.

        Raises:
            SpeculatorsError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise SpeculatorsError("to_pandas() needs pandas", hint="pip install pandas") from None
        return pandas.DataFrame([row for setting in self.settings for row in _rows(setting)])


def _rows(setting: Setting) -> list[dict[str, Any]]:
    """The rows of one setting; None where something was not measured."""
    live = setting.live
    own = (live.acceptance.tau, live.speed) if live else (None, None)
    drafters: list[tuple[str, Acceptance | None, float | None, Speed | None]] = [("speculator", setting.exact, *own)]
    drafters += [(each.name, each.acceptance, each.live_tau, each.speed) for each in setting.baselines]
    for tree in setting.trees:
        timed = (tree.live.acceptance.tau, tree.live.speed) if tree.live else (None, None)
        drafters.append((f"tree {tree.name}", tree.exact, *timed))
    return [
        {
            "suite": setting.suite,
            "temperature": setting.temperature,
            "num_speculative_tokens": setting.num_speculative_tokens,
            "drafter": name,
            "tau": exact.tau if exact else None,
            "tau_low": exact.tau_interval[0] if exact else None,
            "tau_high": exact.tau_interval[1] if exact else None,
            "live_tau": live_tau,
            "speed_up": speed.speed_up if speed else None,
        }
        for name, exact, live_tau, speed in drafters
    ]


@attrs.frozen(eq=False, kw_only=True)
class Speculator:
    """A trained speculator and its verifier, both loaded.

    Attributes:
        model: the draft model.
        engine: the verifier, its tokenizer and its facts.
        num_speculative_tokens: tokens drafted per round (K) unless a call says otherwise.
    """

    model: SpeculatorModel
    engine: Engine
    num_speculative_tokens: int

    def tokens(self, chat: Chat) -> torch.Tensor:
        """The prompt [n] int64 that the verifier's chat template makes of a user's turn or a conversation."""
        return torch.tensor(ChatTemplate.of(self.engine.tokenizer).prompt_ids(_messages(chat)))

    def k(self, num_speculative_tokens: int | None) -> int:
        """The K of a call; raises SpeculatorsError if the algorithm drafts fewer tokens per round."""
        k = self.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
        if problem := too_many_drafts(self.model.config, [k]):
            raise SpeculatorsError(f"num_speculative_tokens: {problem}")
        return k

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.engine.tokenizer.decode(list(tokens), skip_special_tokens=True))


@attrs.frozen(kw_only=True)
class DraftedTokens:
    """The tokens drafted in one round.

    Attributes:
        after: the verifier's own first token, which the draft follows.
        tokens: drafted tokens, verifier vocabulary ids.
        text: of `tokens`.
    """

    after: int
    tokens: tuple[int, ...]
    text: str


@attrs.frozen(kw_only=True)
class Answer:
    """A decoded response.

    Attributes:
        text: the response, without special tokens.
        decoded: its tokens, the rounds that gave them, and where the seconds went.
    """

    text: str
    decoded: Decoded

    @property
    def tau(self) -> float:
        """Acceptance length: tokens emitted per round, the verifier's own included; the first token has no round."""
        rounds = self.decoded.rounds
        return sum(each.emitted for each in rounds) / len(rounds) if rounds else float("nan")


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Loads a recipe, and reports all its problems at once.

    Args:
        name_or_path: a name that `spec ls` lists, or a TOML file.
        overrides: values by their dotted key, as in `--set`; None drops a value.

    Raises:
        RecipeError: the recipe cannot be used; lists all its problems.

    Example:
        recipe = load_recipe("quickstart", {"algorithm.ttt_steps": 4, "schedule.optimizer.lr": 3e-4})
    """
    values = {key: "none" if value is None else value for key, value in (overrides or {}).items()}
    return recipes.load_recipe(str(name_or_path), [f"{key} = {toml_text(value)}" for key, value in values.items()])


def make_plan(recipe: Recipe, *, verifier_config: str | Path | None = None, processes: int = 1) -> Plan:
    """Resolves a recipe for this machine: derived values, stages with their fingerprints, parameter counts.

    Args:
        recipe: from `load_recipe`.
        verifier_config: config.json of the verifier; None fetches it from where the recipe says.
        processes: number of training processes.

    Raises:
        RecipeError: sections contradict each other or the verifier; lists all problems.
        VerifierError: the verifier's config cannot be obtained.

    Example:
        plan = make_plan(load_recipe("smoke"))
        print(plan.run_name, plan.parameters, [stage.name for stage in plan.stages])
    """
    facts = fetch_facts(recipe.verifier) if verifier_config is None else VerifierFacts.read(Path(verifier_config))
    return with_parameters(on_this_machine(plans.make_plan(recipe, facts, world_size=processes)))


def run_recipe(
    recipe: Recipe, *, runs: str | Path = "runs", until: str | None = None, listen: Listen | None = None
) -> Run:
    """Runs every stage that is not on disk yet: verifier, conversations, states, training, benchmark.

    An interrupted run resumes when it is called again, and gives the same bits.

    Args:
        recipe: from `load_recipe`.
        runs: the folder that holds run folders.
        until: the last stage to run ("prepare", "capture", "train"); None for all.
        listen: called with each event (`speculators.events`); None shows progress, in a notebook too.

    Raises:
        SpeculatorsError: something that the user can remedy; finished stages stay.

    Example:
        run = run_recipe(load_recipe("smoke"), listen=print)
        print(run.folder)
    """
    world = start()
    try:
        with RunView() as view:
            outcome = run_stages(
                recipe, places=Places(runs=Path(runs)), world=world, listen=listen or view, until=until
            )
    finally:
        stop(world)
    return read_run(outcome.folder)


def read_run(folder: str | Path) -> Run:
    """Reads the measurements of a run.

    Args:
        folder: a run folder, or the name of a run in ./runs, or a beginning that no other run has.

    Raises:
        RecipeError: there is no such run.
        ArtifactError: its plan is missing or damaged.

    Example:
        read_run("runs/smoke-1a2b3c4d").to_pandas()
    """
    run = find_run(folder)
    plans.read_plan(run.plan)
    benches = read_benches(run.path)
    return Run(folder=run.path, settings=benches.settings, unread=benches.unread)


def load_speculator(folder: str | Path, *, verifier: str | None = None, quiet: bool = False) -> Speculator:
    """Loads a trained speculator together with its verifier.

    Args:
        folder: a run folder, or a speculator's folder.
        verifier: a hub id, a folder or a GGUF file; None for the verifier of the run, or that config.json names.
        quiet: show no progress, only warnings.

    Raises:
        ArtifactError: there is no speculator in the folder, or it is damaged.
        VerifierError: the verifier cannot be obtained or loaded.

    Example:
        speculator = load_speculator("runs/smoke-1a2b3c4d")
    """
    place = find_speculator(Path(folder))
    with RunView(quiet=quiet) as view:
        saved = SavedSpeculator(folder=place, recipe=recipe_of(place), verifier=verifier)
        model, engine = load_saved(saved, progress=view)
    config = model.config.speculators_config
    return Speculator(
        model=model,
        engine=engine,
        num_speculative_tokens=config.proposal_methods[0].speculative_tokens if config else 3,
    )


@torch.inference_mode()
def draft(
    speculator: Speculator,
    chat: Chat,
    *,
    num_speculative_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> DraftedTokens:
    """Drafts the tokens of one round, after the verifier's first token of the answer.

    Args:
        speculator: from `load_speculator`.
        chat: a user's turn, or a conversation that ends with one.
        num_speculative_tokens: K; None for the speculator's own.
        temperature: 0 drafts greedily.
        seed: of the sampling.

    Raises:
        ContractError: the algorithm has no `draft`.

    Example:
        draft(speculator, "Name three colours.", num_speculative_tokens=5).text
    """
    drafter, engine = speculator.model.draft(), speculator.engine
    generator = torch.Generator(engine.device).manual_seed(seed)
    prompt = speculator.tokens(chat).to(engine.device)
    logits, states = CachedVerifier(engine.model, drafter.target_layer_ids).prefill(prompt)
    first = verify(logits[None], None, temperature=temperature, generator=generator).token
    state = drafter.begin(torch.cat([prompt, torch.tensor([first], device=engine.device)]), states)
    proposal = drafter.propose(
        state,
        num_tokens=speculator.k(num_speculative_tokens),
        temperature=temperature,
        generator=generator,
    )
    tokens = tuple(proposal.tokens.tolist())
    return DraftedTokens(after=first, tokens=tokens, text=speculator.text(tokens))


@sharing_the_cpu()
def decode(
    speculator: Speculator,
    chat: Chat,
    *,
    max_new_tokens: int = 128,
    num_speculative_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    listen: OnTokens = unheard,
) -> Answer:
    """Answers with the verifier, drafting with the speculator; the answer is the verifier's own.

    Args:
        speculator: from `load_speculator`.
        chat: a user's turn, or a conversation that ends with one.
        max_new_tokens: longer answers are cut.
        num_speculative_tokens: K; 0 decodes without drafts, None for the speculator's own.
        temperature: 0 is greedy.
        seed: of the sampling.
        listen: called with the tokens of each round as they come, and how many of them are accepted drafts.

    Raises:
        ContractError: the algorithm has no `draft`.

    Example:
        answer = decode(speculator, "Name three colours.", temperature=0.7)
        print(answer.text, answer.tau)
    """
    k, engine = speculator.k(num_speculative_tokens), speculator.engine
    drafter = speculator.model.draft() if k else None
    decoded = decode_tokens(
        CachedVerifier(engine.model, drafter.target_layer_ids if drafter else ()),
        drafter,
        speculator.tokens(chat),
        max_new_tokens=max_new_tokens,
        num_tokens=k,
        temperature=temperature,
        generator=torch.Generator(engine.device).manual_seed(seed),
        stop_ids=frozenset(engine.stop_ids),
        listen=listen,
    )
    return Answer(text=speculator.text(decoded.tokens), decoded=decoded)


@sharing_the_cpu()
def replay(
    speculator: Speculator,
    chats: Sequence[Chat],
    *,
    max_new_tokens: int = 128,
    num_speculative_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Acceptance:
    """Computes the exact acceptance length on prompts, in one pass over the verifier's own answers.

    Args:
        speculator: from `load_speculator`.
        chats: prompts, each a user's turn or a conversation that ends with one; the verifier answers them.
        max_new_tokens: longer answers are cut.
        num_speculative_tokens: K; None for the speculator's own.
        temperature: at which the verifier answers and drafts are made; 0 is greedy.
        seed: of the sampling, and of the bootstrap over prompts.

    Raises:
        ContractError: the algorithm has no `replay` or no `draft`.

    Example:
        acceptance = replay(speculator, ["Name three colours.", "What is a prime number?"])
        print(acceptance.tau, acceptance.tau_interval, acceptance.by_position)
    """
    k, engine = speculator.k(num_speculative_tokens), speculator.engine
    rows = own_rows(
        engine,
        load_head(engine.folder, engine.facts).to(engine.device),
        [Prompt(id=str(index), category="", messages=_messages(chat)) for index, chat in enumerate(chats)],
        speculator.model.draft().target_layer_ids,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    replayed = replay_each(speculator.model, rows, [k], temperature=temperature)[k]
    return summarize(replayed.counts(k), replayed.ids, seed=seed)


def _messages(chat: Chat) -> tuple[Message, ...]:
    if isinstance(chat, str):
        return (Message("user", chat),)
    return tuple(Message(each["role"], each["content"]) for each in chat)
