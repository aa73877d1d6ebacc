"""What every setting of one benchmark shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs

from speculators.bench.rows import JudgedResponse
from speculators.decoding.baselines import Baseline
from speculators.drafter import Drafter, Replays
from speculators.events import Pieces
from speculators.recipe.schema import BenchmarkSection
from speculators.recipe.tree import TreeShape
from speculators.verifier.engine import Engine
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.weights import VerifierHead

# The verifier's own responses by (suite, temperature), made by `own_rows` with the same settings.
KnownRows = Mapping[tuple[str, float], Sequence[JudgedResponse]]


class Benchable(Replays, Protocol):
    """A speculator that can be measured: it replays, and it drafts live."""

    def draft(self) -> Drafter:
        """Makes a drafter that decodes with it."""


@attrs.frozen(eq=False)
class TimedPair:
    """Verifier and speculator in the dtype in which decoding is timed.

    Attributes:
        model: the speculator, in evaluation mode, on the engine's device.
        engine: its verifier.
        baselines: training-free drafters to time beside it.
    """

    model: Benchable
    engine: Engine
    baselines: tuple[Baseline, ...] = ()


@attrs.frozen(eq=False, kw_only=True)
class BenchContext:
    """What every setting of one benchmark shares.

    Attributes:
        head: the verifier's head over its whole vocabulary, in float32.
        level: confidence level of one interval. All sampled settings together agree with probability 1 - FALSE_ALARM or
            more if the speculator is correct.
        pieces: reports the work of all settings as one.
        known_rows: rows that the caller already has.
        baselines: training-free drafters to measure beside it.
        live: whether drafts are decoded live.
        timed: what is timed; None times the live check.
    """

    model: Benchable
    engine: RespondingVerifier
    head: VerifierHead
    section: BenchmarkSection
    seed: int
    level: float
    pieces: Pieces
    known_rows: KnownRows
    baselines: tuple[Baseline, ...]
    live: bool
    timed: TimedPair | None

    @property
    def k_max(self) -> int:
        """The largest K."""
        return max(self.section.num_speculative_tokens)


def tree_label(shape: TreeShape) -> str:
    """Names the speculator with trees of this shape among what is decoded live."""
    return f"tree {shape.name}"


def label(num_tokens: int) -> str:
    """Names the speculator with `num_tokens` drafts among what is decoded live."""
    return f"K={num_tokens}"
