"""The baselines that need no training, by name."""

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
from speculators.verifier.engine import Engine


@attrs.frozen(eq=False)
class Baseline:
    """A drafter to measure beside a speculator.

    Attributes:
        name: as it was asked for.
        draft: returns a drafter that has seen nothing yet.
        replays: its logits for all places at once; None where it drafts by the tokens alone, without probabilities.
    """

    name: str
    draft: Callable[[], Drafter]
    replays: Replays | None = None


WITHOUT_MODEL: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter, "suffix": SuffixDrafter}


def make_baseline(name: str, verifier: Engine, *, base: Path = Path(), progress: Progress = ignore) -> Baseline:
    """Returns the baseline of that name.

    Args:
        name: as `benchmark.baselines` takes it.
        verifier: that it drafts for.
        base: the folder that a relative source starts from.
        progress: is told about a draft model's download and conversion.

    Raises:
        SpeculatorsError: its model cannot be loaded, or has another tokenizer.
    """
    if name in WITHOUT_MODEL:
        return Baseline(name, WITHOUT_MODEL[name])
    source = name.removeprefix(f"{WITH_MODEL}:")
    model = load_draft_model(source, verifier, base=base, progress=progress)
    return Baseline(name, model.draft, model)
