"""What a recipe holds: frozen sections with their defaults and the checks of one field or one section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import field

from speculators.config import few, positive
from speculators.errors import Problem
from speculators.recipe.algorithm import AlgorithmSection
from speculators.recipe.input_sections import DataSection, VerifierSection
from speculators.structure import validators
from speculators.structure.converter import CONVERTER, build
from speculators.structure.origin import Origin
from speculators.structure.validators import (
    between,
    cadence,
    each,
    known_baselines,
    matches,
    not_empty,
    not_negative,
    one_of,
)

SINKS = ("tensorboard", "wandb", "mlflow")


def _band(_: object, __: attrs.Attribute[Any], value: tuple[float, float]) -> None:
    if not 1 <= value[0] <= value[1]:
        raise ValueError(f"must be [low, high] with 1 <= low <= high, got {list(value)}")


@attrs.frozen(kw_only=True)
class OptimizerSection:
    """`schedule.optimizer`.

    Attributes:
        name: "adamw", or "muon" for the matrices of the layers with adamw for the rest.
        lr: peak learning rate; with muon, that of the matrices.
        weight_decay: decoupled; a share of the weight, times the learning rate, goes in each update.
        betas: of adamw, and of the part of the parameters that muon leaves to adamw.
        clip_norm: largest norm of the gradient; None for no clipping.
        momentum: of muon.
        adamw_lr: with muon, peak learning rate of what is not a matrix of a layer (embeddings, norms, head).
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
    """`schedule.learning_rate`: the factor on the peak rate over the run.

    Attributes:
        shape: of the fall after the warm-up: "linear", "cosine", "wsd" (constant, then a decay) or "constant".
        warmup: share of the steps in which the rate rises from 0.
        decay: share of the steps in which "wsd" decays.
        floor: where the decay ends, as a share of the peak rate.
    """

    shape: str = field(default="cosine", validator=one_of("linear", "cosine", "wsd", "constant"))
    warmup: float = field(default=0.02, validator=between(0, 1))
    decay: float = field(default=0.2, validator=between(0, 1))
    floor: float = field(default=0.0, validator=between(0, 1))

    def __attrs_post_init__(self) -> None:
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup and decay share the steps: {self.warmup:g} + {self.decay:g} is more than 1")


@attrs.frozen(kw_only=True)
class ScheduleSection:
    """`[schedule]`: how long, in which steps, at which rate.

    Attributes:
        epochs: passes over the conversations.
        max_steps: stop after so many optimizer updates; None for `epochs` passes.
        tokens_per_step: tokens of the global batch, whatever the number of processes.
        row_tokens: tokens of one packed row; None for `data.max_tokens`.
        optimizer: its kind and numbers.
        learning_rate: the factor on the peak rate over the run.
        precision: "bf16" computes in bfloat16 over float32 weights, "fp32" in float32.
        evaluate_every: steps, or a share of the run.
        checkpoint_every: steps, or a share of the run.
        keep_checkpoints: how many of the latest stay on disk, besides the best.
    """

    epochs: int = field(default=1, validator=positive)
    max_steps: int | None = field(default=None, validator=positive)
    tokens_per_step: int = field(default=65_536, validator=positive)
    row_tokens: int | None = field(default=None, validator=positive)
    optimizer: OptimizerSection = OptimizerSection()
    learning_rate: LearningRate = LearningRate()
    precision: str = field(default="bf16", validator=one_of("bf16", "fp32"))
    evaluate_every: str | int = field(default="10%", validator=cadence)
    checkpoint_every: str | int = field(default="10%", validator=cadence)
    keep_checkpoints: int = field(default=2, validator=positive)


@attrs.frozen(kw_only=True)
class DistributedSection:
    """`[distributed]`: how the processes of a launch share the model.

    Attributes:
        shard: over all processes (FSDP2); false keeps a copy in each.
    """

    shard: bool = True


@attrs.frozen(kw_only=True)
class Suite:
    """Prompts to measure on: a name of the catalogue, or a name of one's own with a path or hub id.

    Attributes:
        name: of the catalogue, or one's own where a path follows.
        path: a JSONL file or the hub id of a data set; None for the catalogue's.
        split: which rows; None for the catalogue's, or all.
        take: the first so many prompts; None for all.
    """

    name: str = field(validator=matches(r"[\w.-]+", "letters, digits, _, - and ."))
    path: str | None = None
    split: str | None = None
    take: int | None = field(default=None, validator=positive)


@CONVERTER.register_structure_hook
def _suite_or_name(value: Any, _: Any) -> Suite:
    return build(Suite, {"name": value} if isinstance(value, str) else value)


@attrs.frozen(kw_only=True)
class BenchmarkSection:
    """`[benchmark]`: what acceptance is measured on.

    Attributes:
        suites: the first one also chooses the best checkpoint.
        num_speculative_tokens: the K that are reported.
        temperature: each one is measured; 0 is greedy.
        max_new_tokens: of each of the verifier's responses.
        live_prompts: prompts that the live decode re-measures in each setting; None for all.
        live_tokens: of each of them, the first so many tokens of the response; None for all.
        baselines: drafters without training to measure beside: "ngram", "suffix", "draft_model:SOURCE".
    """

    suites: tuple[Suite, ...] = field(default=())
    num_speculative_tokens: tuple[int, ...] = field(default=(3, 5, 7), validator=each(few))
    temperature: tuple[float, ...] = field(default=(0.0,), validator=each(not_negative))
    max_new_tokens: int = field(default=160, validator=positive)
    live_prompts: int | None = field(default=8, validator=positive)
    live_tokens: int | None = field(default=64, validator=positive)
    baselines: tuple[str, ...] = field(default=("ngram",), validator=known_baselines)

    @num_speculative_tokens.validator
    def _within_a_response(self, attribute: attrs.Attribute[Any], value: tuple[int, ...]) -> None:
        if value and max(value) > self.max_new_tokens:
            raise ValueError(f"must be at most max_new_tokens = {self.max_new_tokens}, got {list(value)}")

    @suites.validator
    def _distinct(self, attribute: attrs.Attribute[Any], value: tuple[Suite, ...]) -> None:
        names = [suite.name for suite in value]
        if len(set(names)) != len(names):
            raise ValueError(f"must have distinct names, got {names}")


@attrs.frozen(kw_only=True)
class Expect:
    """One band of `[expect]`: the acceptance length that was measured, and by what.

    Attributes:
        tau: lowest and highest acceptance length that a run of this recipe should reach.
        source: the measurement that it was written from.
    """

    tau: tuple[float, float] = field(validator=_band)
    source: str = field(validator=not_empty)


@attrs.frozen(kw_only=True)
class TrackingSection:
    """`[tracking]`.

    Attributes:
        sinks: what gets loss and acceptance besides `events.jsonl`, which is always written; each is an optional
            extra of the same name.
    """

    sinks: tuple[str, ...] = field(default=())

    @sinks.validator
    def _known_and_distinct(self, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
        for sink in value:
            one_of(*SINKS)(self, attribute, sink)
        if len(set(value)) != len(value):
            raise ValueError(f"must hold distinct values, got {list(value)}")


@attrs.frozen(kw_only=True)
class ReproduceSection:
    """`[reproduce]`: what `spec reproduce` holds a re-run to.

    Attributes:
        tolerance: on another platform, of each value relative to it (or to 1, if it is smaller), and of each weight
            tensor relative to its norm. On the same platform the bits must be the same.
    """

    tolerance: float = field(default=0.01, validator=between(0, 1))


@attrs.frozen(kw_only=True)
class Recipe:
    """What the author wrote, with the defaults; `file` and `origins` say where and are no part of its meaning.

    Attributes:
        format: of the file; older ones are migrated on load.
        name: of the recipe; run folders begin with it.
        version: of the recipe; changes when its meaning changes.
        summary: one line for `spec ls`.
        hardware: what it ran on, or was planned for; for people, who choose by it.
        seed: of initialisation, order of the conversations and everything drawn in training.
        extends: the recipe that everything is taken from that this one does not say.
        verifier: the model that is drafted for.
        data: conversations and the verifier's states for them.
        algorithm: the kind of draft model, and its parameters.
        schedule: how long, in which steps, at which rate.
        distributed: how the processes of a launch share the model.
        benchmark: what acceptance is measured on.
        expect: by setting, the acceptance length that this recipe is known to reach.
    """

    format: int
    name: str = field(validator=matches(r"[A-Za-z0-9][\w.-]*", "letters, digits, _, - and ."))
    version: str = field(validator=matches(r"\d+\.\d+\.\d+", 'three numbers such as "1.0.0"'))
    summary: str = ""
    hardware: str = ""
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

    @property
    def row_tokens(self) -> int:
        """Tokens of one packed row: `schedule.row_tokens`, or the length of the longest conversation."""
        return self.schedule.row_tokens or self.data.max_tokens

    def problem(self, path: str, message: str, hint: str = "") -> Problem:
        """Returns a Problem at a TOML path, with file and line of the value or of what is written nearest to it."""
        written = {key: origin for key, origin in self.origins.items() if origin.kind != "default"}
        place = path
        while place:
            below = (origin for key, origin in written.items() if key.startswith((f"{place}.", f"{place}[")))
            if found := written.get(place) or next(below, None):
                return Problem(path, message, hint, found.file, found.line)
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        return Problem(path, message, hint, str(self.file) if self.file else None)
