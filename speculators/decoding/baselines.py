"""Makes drafters that need no training of their own, by name, to measure beside a speculator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs

from speculators.decoding.draft_model import load_draft_model
from speculators.decoding.hybrid import HybridDrafter
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.suffix import SuffixDrafter
from speculators.drafter import Drafter, Replays
from speculators.events import Progress, ignore
from speculators.structure.validators import HYBRID
from speculators.verifier.responding import RespondingVerifier


@attrs.frozen(eq=False)
class Baseline:
    """A drafter to measure beside a speculator.

    Attributes:
        name: as in `benchmark.baselines`.
        draft: makes a drafter that has seen no sequence yet.
        replays: its logits for all places at once; None for drafters that look tokens up and have no probabilities.
        hybrid: whether the speculator drafts where this drafter proposes nothing.
    """

    name: str
    draft: Callable[[], Drafter]
    replays: Replays | None = None
    hybrid: bool = False

    def drafter(self, speculator: Callable[[], Drafter]) -> Drafter:
        """Makes the drafter for live decoding; a hybrid's combines it with the speculator's."""
        return HybridDrafter(self.draft(), speculator()) if self.hybrid else self.draft()


LOOK_UP_DRAFTERS: dict[str, type[NgramDrafter | SuffixDrafter]] = {"ngram": NgramDrafter, "suffix": SuffixDrafter}
# Tokens that must match before a hybrid's look-up proposes. Chosen on 60 conversations that a speculator of the
# quickstart was not trained on (K = 5, T = 0; tau 1.936 alone): 1, 2 and 3 tokens gave tau 2.216, 2.341 and 2.305 with
# n-grams; 2, 3 and 4 gave 2.184, 2.263 and 2.266 with suffixes.
SHORTEST_MATCH = {"ngram": 2, "suffix": 3}


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
    if name in LOOK_UP_DRAFTERS:
        return Baseline(name, LOOK_UP_DRAFTERS[name])
    kind, _, source = name.partition(":")
    if kind == HYBRID:
        return Baseline(name, partial(LOOK_UP_DRAFTERS[source], shortest=SHORTEST_MATCH[source]), hybrid=True)
    model = load_draft_model(source, verifier, base=base, progress=progress)
    return Baseline(name, model.draft, model)
