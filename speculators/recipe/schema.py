"""The recipe and its sections: frozen values with their defaults, and the checks of one field or one section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field

from speculators.config import OFF_BY_DEFAULT, few, positive
from speculators.errors import Problem, RecipeError
from speculators.recipe.algorithm import AlgorithmSection
from speculators.recipe.field_map import SuiteMap
from speculators.recipe.input_sections import DTYPES, DataSection, DataSource, VerifierSection, is_data_path
from speculators.recipe.token_filter import TokenFilter
from speculators.recipe.tracking import TrackingSection
from speculators.recipe.tree import TreeShape, known_trees, parse_tree
from speculators.structure import validators
from speculators.structure.converter import CONVERTER, build
from speculators.structure.origin import Origin
from speculators.structure.validators import (
    band,
    between,
    cadence,
    each,
    known_baselines,
    matches,
    not_empty,
    not_negative,
    one_of,
    share_above_zero,
)

# The end of `hardware` where a recipe has not run yet.
PLANNED = ", planned"


def _decay(_: object, __: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise ValueError(f'must be above 0 and below 1, or "none", got {value!r}')


def _shard(_: object, __: attrs.Attribute[Any], value: bool | str) -> None:
    if value not in (True, False, "node"):
        raise ValueError(f'must be true, false or "node", got {value!r}')


def _temperatures(_: object, __: attrs.Attribute[Any], value: tuple[float, ...] | str) -> None:
    if not isinstance(value, str):
        each(not_negative)(_, __, value)


@attrs.frozen(kw_only=True)
class OptimizerSection:
    """`schedule.optimizer`.

    Attributes:
        name: "adamw", or "muon", which updates the layers' matrices with muon and everything else with adamw.
        lr: peak learning rate; with muon, the rate of the matrices.
        weight_decay: decoupled weight decay: each update subtracts this share of the weight times the learning rate.
        betas: adamw's two decay rates, also for the parameters that muon leaves to adamw.
        clip_norm: largest norm of the gradient; None for no clipping.
        momentum: momentum of muon.
        adamw_lr: with muon, peak learning rate of everything but the layers' matrices (embeddings, norms, head).
    """

    name: str = field(default="adamw", validator=one_of("adamw", "muon"))
    lr: float = field(default=1e-4, validator=positive)
    weight_decay: float = field(default=0.0, validator=not_negative)
    betas: tuple[float, float] = field(default=(0.9, 0.95))
    clip_norm: float | None = field(default=1.0, validator=positive)
    momentum: float = field(default=0.95, validator=between(0, 1))
    adamw_lr: float | None = field(default=None, validator=positive)

    @betas.validator
    def _betas_below_one(self, attribute: attrs.Attribute[Any], value: tuple[float, float]) -> None:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"must be two numbers from 0 to below 1, got {list(value)}")

    def __attrs_post_init__(self) -> None:
        if self.adamw_lr is not None and self.name != "muon":
            raise ValueError('adamw_lr is for name = "muon"; with adamw, lr is the rate of all parameters')


@attrs.frozen(kw_only=True)
class LearningRate:
    """`schedule.learning_rate`: how the rate changes over the run, as a factor of the peak rate.

    Attributes:
        shape: course after the warm-up: "linear", "cosine", "wsd" (constant, then a decay) or "constant".
        warmup: share of the steps in which the rate rises from 0.
        decay: share of the steps in which "wsd" decays.
        floor: rate at the end of the decay, as a share of the peak rate.
    """

    shape: str = field(default="cosine", validator=one_of("linear", "cosine", "wsd", "constant"))
    warmup: float = field(default=0.02, validator=between(0, 1))
    decay: float = field(default=0.2, validator=between(0, 1))
    floor: float = field(default=0.0, validator=between(0, 1))

    def __attrs_post_init__(self) -> None:
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup and decay must sum to at most 1, got {self.warmup:g} + {self.decay:g}")


@attrs.frozen(kw_only=True)
class ScheduleSection:
    """`[schedule]`: length of the training, batch size, optimizer and learning rate.

    Attributes:
        epochs: passes over the conversations.
        max_steps: number of optimizer updates after which training stops; None for `epochs` passes.
        tokens_per_step: tokens of the global batch, whatever the number of processes.
        row_tokens: tokens of one packed row; None for `data.max_tokens`.
        optimizer: the optimizer and its parameters.
        learning_rate: how the learning rate changes over the run.
        ema: decay of an exponential moving average of the weights, which is evaluated and exported in their place, such
            as 0.99; update t (from 0) takes min(ema, (1 + t) / (10 + t)). None for no average.
        precision: "bf16" computes in bfloat16 with float32 weights, "fp32" in float32.
        gradient_precision: "bf16" adds up the gradients of several processes in bfloat16, which halves their traffic;
            "fp32" in float32. Each process sums the gradients of its own rows in float32.
        evaluate_every: steps between evaluations, or a share of the run such as "10%".
        checkpoint_every: steps between checkpoints, or a share of the run such as "10%".
        keep_checkpoints: number of latest checkpoints to keep, besides the best.
    """

    epochs: int = field(default=1, validator=positive)
    max_steps: int | None = field(default=None, validator=positive)
    tokens_per_step: int = field(default=65_536, validator=positive)
    row_tokens: int | None = field(default=None, validator=positive)
    optimizer: OptimizerSection = OptimizerSection()
    learning_rate: LearningRate = LearningRate()
    ema: float | None = field(default=None, validator=_decay, metadata=OFF_BY_DEFAULT)
    precision: str = field(default="bf16", validator=one_of("bf16", "fp32"))
    gradient_precision: str = field(default="fp32", validator=one_of("bf16", "fp32"), metadata=OFF_BY_DEFAULT)
    evaluate_every: str | int = field(default="10%", validator=cadence)
    checkpoint_every: str | int = field(default="10%", validator=cadence)
    keep_checkpoints: int = field(default=2, validator=positive)


@attrs.frozen(kw_only=True)
class DistributedSection:
    """`[distributed]`: how the processes of a launch share the models.

    Attributes:
        shard: true shards the model over all processes (FSDP2), "node" over those of each machine (HSDP), so that
            machines send each other only gradients; false keeps a copy in each process.
        shard_verifier: likewise the verifier, layer by layer, for one that does not fit in a GPU; false keeps a copy in
            each process that computes with it, which is faster.
    """

    shard: bool | str = field(default=True, validator=_shard)
    shard_verifier: bool = False


@attrs.frozen(kw_only=True)
class Suite:
    """A set of prompts to measure on: a suite of the catalogue by name, or your own by path or hub id.

    Attributes:
        name: a suite of the catalogue, or with `path`, a name of your choice.
        path: a JSONL file or the hub id of a data set; None for the catalogue's path.
        split: which rows to use; None for the catalogue's split, or all rows.
        take: use only the first prompts, this many; None for all.
        subset: the part of a data set that has a name of its own.
        revision: commit of a data set.
        map: the fields that hold questions, turns and so on; None for the layouts that are known.
    """

    name: str = field(validator=matches(r"[\w.-]+", "letters, digits, _, - and ."))
    path: str | None = None
    split: str | None = None
    take: int | None = field(default=None, validator=positive)
    subset: str | None = None
    revision: str | None = None
    map: SuiteMap | None = None

    @property
    def source(self) -> DataSource:
        """Where the prompts are read from; only of a suite that has a path, as `resolved_suite` completes it."""
        assert self.path is not None, f"the suite {self.name} is not resolved"
        same = {name: getattr(self, name) for name in ("path", "split", "take", "subset", "revision", "map")}
        return DataSource(**same)


def suite_values(argument: str) -> dict[str, str]:
    """The values of a suite that a command line gives: a name of the catalogue, a suite's TOML file, or rows."""
    is_path = is_data_path(argument) or argument.endswith(".toml")
    return {"name": Path(argument).stem, "path": argument} if is_path else {"name": argument}


@CONVERTER.register_structure_hook
def _suite_or_name(value: Any, _: Any) -> Suite:
    return build(Suite, {"name": value} if isinstance(value, str) else value)


@attrs.frozen(kw_only=True)
class BenchmarkSection:
    """`[benchmark]`: the prompts and settings that acceptance is measured with.

    Attributes:
        suites: sets of prompts; the first also chooses the best checkpoint.
        num_speculative_tokens: values of K to measure; the first is the one that a server gets.
        temperature: temperatures to measure; 0 is greedy. "model" takes temperature, top_p, top_k and min_p from the
            verifier's generation_config.json.
        top_p: above temperature 0, the verifier samples from the fewest tokens that have this probability together.
        top_k: above temperature 0, the verifier samples from this many most probable tokens.
        min_p: above temperature 0, the verifier samples from tokens with at least this share of the most probable
            token's probability.
        verification: above temperature 0, judges the drafts of a round "token" by token or together, as a "block".
        max_new_tokens: length of each of the verifier's responses.
        live_prompts: prompts that live decoding measures again in each setting; None for all.
        live_tokens: tokens of each response that live decoding goes through; None for all.
        timed_dtype: dtype of verifier and draft where decoding is timed; None for `verifier.dtype`, in which the live
            check runs.
        baselines: drafters measured for comparison: "ngram", "suffix", "hybrid:ngram", "hybrid:suffix",
            "draft_model:SOURCE".
        trees: shapes of trees that the speculator also drafts, at temperature 0: "4x2x1" gives the children of each
            node by depth, "dynamic:16" takes the 16 nodes that the draft finds most likely, up to the largest K deep.
    """

    suites: tuple[Suite, ...] = field(default=())
    num_speculative_tokens: tuple[int, ...] = field(default=(3, 5, 7), validator=each(few))
    temperature: tuple[float, ...] | Literal["model"] = field(default=(0.0,), validator=_temperatures)
    top_p: float | None = field(default=None, validator=share_above_zero, metadata=OFF_BY_DEFAULT)
    top_k: int | None = field(default=None, validator=positive, metadata=OFF_BY_DEFAULT)
    min_p: float | None = field(default=None, validator=share_above_zero, metadata=OFF_BY_DEFAULT)
    verification: str = field(default="token", validator=one_of("token", "block"), metadata=OFF_BY_DEFAULT)
    max_new_tokens: int = field(default=160, validator=positive)
    live_prompts: int | None = field(default=8, validator=positive)
    live_tokens: int | None = field(default=64, validator=positive)
    timed_dtype: str | None = field(
        default=None, validator=attrs.validators.optional(one_of(*DTYPES)), metadata=OFF_BY_DEFAULT
    )
    baselines: tuple[str, ...] = field(default=("ngram",), validator=known_baselines)
    trees: tuple[str, ...] = field(default=(), validator=known_trees, metadata=OFF_BY_DEFAULT)

    @num_speculative_tokens.validator
    def _within_a_response(self, attribute: attrs.Attribute[Any], value: tuple[int, ...]) -> None:
        if value and max(value) > self.max_new_tokens:
            raise ValueError(f"must be at most max_new_tokens = {self.max_new_tokens}, got {list(value)}")

    @suites.validator
    def _distinct(self, attribute: attrs.Attribute[Any], value: tuple[Suite, ...]) -> None:
        names = [suite.name for suite in value]
        if len(set(names)) != len(names):
            raise ValueError(f"must have distinct names, got {names}")

    @property
    def tree_shapes(self) -> tuple[TreeShape, ...]:
        """The shapes of `trees`."""
        return tuple(map(parse_tree, self.trees))

    @property
    def token_filter(self) -> TokenFilter:
        """The tokens that the verifier samples from."""
        return TokenFilter(min_p=self.min_p, top_k=self.top_k, top_p=self.top_p)

    @property
    def block_verification(self) -> bool:
        """Whether drafts are judged as a block."""
        return self.verification == "block"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures as numbers; raises RecipeError for "model", which only a plan resolves."""
        if isinstance(self.temperature, str):
            hint = "write those of its generation_config.json: temperature = [0.6], top_p = 0.95"
            raise RecipeError([Problem("benchmark.temperature", '"model" must be numbers here', hint)])
        return self.temperature

    def __attrs_post_init__(self) -> None:
        if self.trees and self.temperature != "model" and 0 not in self.temperatures:
            raise ValueError("trees: drafted at temperature 0 only; add it, or leave them out")
        names = list(self.token_filter.on)
        if self.temperature == "model":
            if names:
                raise ValueError(f'{", ".join(names)}: temperature = "model" takes the verifier\'s own; leave it out')
            return
        names += ["verification"] if self.block_verification else []
        if names and not any(temperature > 0 for temperature in self.temperatures):
            hint = "add a temperature above 0, or leave it out"
            raise ValueError(f"{', '.join(names)}: greedy decoding does not sample; {hint}")


@attrs.frozen(kw_only=True)
class Expect:
    """One band of `[expect]`: a measured acceptance length, and the source of the measurement.

    Attributes:
        tau: lowest and highest acceptance length that a run of this recipe should reach.
        source: the measurement behind the band.
    """

    tau: tuple[float, float] = field(validator=band)
    source: str = field(validator=not_empty)


@attrs.frozen(kw_only=True)
class ReproduceSection:
    """`[reproduce]`: how closely `spec reproduce` requires a re-run to agree.

    Attributes:
        tolerance: largest difference allowed on another platform: for a value, relative to it (or to 1 if the value is
            smaller); for a weight tensor, relative to its norm. On the same platform all bits must agree.
    """

    tolerance: float = field(default=0.01, validator=between(0, 1))


@attrs.frozen(kw_only=True)
class Recipe:
    """A recipe as the author wrote it, completed with the defaults.

    Attributes:
        format: format of the file; older formats are migrated on load.
        name: name of the recipe; run folders begin with it.
        version: version of the recipe; raised when its meaning changes.
        summary: one line for `spec ls`.
        hardware: machine that the recipe ran on; "MACHINE, planned" where it has not run yet.
        minutes: usual length of a whole run there: measured, or estimated for a planned machine.
        seed: seed of the initialisation, the order of the conversations and everything drawn in training.
        extends: recipe that supplies every value that this one does not set.
        verifier: the model that the draft is trained for.
        data: conversations and the verifier's states for them.
        algorithm: the kind of draft model, and its parameters.
        schedule: length of the training, batch size, optimizer and learning rate.
        distributed: how the processes of a launch share the model.
        benchmark: the prompts and settings that acceptance is measured with.
        expect: the acceptance length that this recipe is known to reach, by setting.
        file: where the recipe was read; not part of its meaning.
        origins: where each value was written, by TOML path; not part of its meaning.
        notes: how loading read what can be read in two ways; not part of its meaning.
    """

    format: int
    name: str = field(validator=matches(r"[A-Za-z0-9][\w.-]*", "letters, digits, _, - and ."))
    version: str = field(validator=matches(r"\d+\.\d+\.\d+", 'three numbers such as "1.0.0"'))
    summary: str = ""
    hardware: str = ""
    minutes: float | None = field(default=None, validator=positive)
    seed: int = field(default=0, validator=validators.seed)
    extends: str | None = None
    verifier: VerifierSection
    data: DataSection
    algorithm: AlgorithmSection
    schedule: ScheduleSection = ScheduleSection()
    distributed: DistributedSection = DistributedSection()
    benchmark: BenchmarkSection = BenchmarkSection()
    tracking: TrackingSection = TrackingSection()
    reproduce: ReproduceSection = ReproduceSection()
    expect: dict[str, Expect] = field(factory=dict)
    file: Path | None = field(default=None, eq=False)
    origins: Mapping[str, Origin] = field(factory=dict, eq=False, repr=False)
    notes: tuple[str, ...] = field(default=(), eq=False, repr=False)

    @property
    def loads_verifier(self) -> bool:
        """Whether a process of a run loads the verifier, rather than leaving all its work to a server."""
        return not self.data.served or self.data.regenerate is not None or self.measures_itself

    @property
    def measures_itself(self) -> bool:
        """Whether a process of a run evaluates and measures with the verifier, rather than a server."""
        return bool(self.benchmark.suites) and not self.data.evaluates_served

    @property
    def row_tokens(self) -> int:
        """Tokens of one packed row: `schedule.row_tokens`, or the length of the longest conversation."""
        return self.schedule.row_tokens or self.data.max_tokens

    @property
    def usual_time(self) -> str:
        """How long a run takes, and where: "10 min, 2 CPU cores"; "" where the recipe does not say."""
        if self.minutes is None:
            return ""
        length = f"{self.minutes:.3g} min" if self.minutes < 100 else f"{self.minutes / 60:.2g} h"
        sign = "est. " if self.hardware.endswith(PLANNED) else ""
        return ", ".join(filter(None, (sign + length, self.hardware.removesuffix(PLANNED))))

    def problem(self, path: str, message: str, hint: str = "") -> Problem:
        """Reports a problem at a TOML path, with the file and line of the value or of its nearest written neighbour."""
        written = {key: origin for key, origin in self.origins.items() if origin.kind != "default"}
        place = path
        while place:
            below = (origin for key, origin in written.items() if key.startswith((f"{place}.", f"{place}[")))
            if origin := written.get(place) or next(below, None):
                return Problem(path, message, hint, origin.file, origin.line)
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        return Problem(path, message, hint, str(self.file) if self.file else None)
