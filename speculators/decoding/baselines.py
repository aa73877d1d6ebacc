"""Makes drafters that need no training, by name, to measure beside a speculator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from speculators.decoding.draft_model import load_draft_model
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.suffix import SuffixDrafter
from speculators.drafter import Drafter, Replays
from speculators.events import Progress, ignore
from speculators.structure.validators import WITH_MODEL
from speculators.verifier.responding import RespondingVerifier


@attrs.frozen(eq=False)
class Baseline:
    """A drafter to measure beside a speculator.

    Attributes:
        name: as in `benchmark.baselines`.
        draft: makes a drafter that has seen no sequence yet.
        replays: its logits for all places at once; None for drafters that look tokens up and have no probabilities.
    """

    name: str
    draft: Callable[[], Drafter]
    replays: Replays | None = None


WITHOUT_MODEL: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter, "suffix": SuffixDrafter}


def make_baseline(
    name: str, verifier: RespondingVerifier, *, base: Path = Path(), progress: Progress = ignore
) -> Baseline:
    """Makes a baseline, loading its model if it has one.

    Args:
        name: as in `benchmark.baselines`.
        verifier: the model to draft for.
        base: folder that a relative source starts from.
        progress: receives reports of a draft model's download and conversion.

    Raises:
        SpeculatorsError: the model cannot be loaded, or its tokenizer differs from the verifier's.
    """
    if name in WITHOUT_MODEL:
        return Baseline(name, WITHOUT_MODEL[name])
    source = name.removeprefix(f"{WITH_MODEL}:")
    model = load_draft_model(source, verifier, base=base, progress=progress)
    return Baseline(name, model.draft, model)
