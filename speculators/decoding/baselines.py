"""The baselines that need no training, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from speculators.decoding.draft_model import load_draft_model
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.suffix import SuffixDrafter
from speculators.drafter import Drafter, Replays
from speculators.errors import RegistryError
from speculators.events import Progress, ignore
from speculators.registry import near_miss
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
WITH_MODEL = "draft_model"
FORMS = (*WITHOUT_MODEL, f"{WITH_MODEL}:SOURCE")


def check_baseline(name: str) -> None:
    """Checks a baseline's name; its source is checked when it is loaded.

    Raises:
        RegistryError: there is none of that name; names those that there are, and the nearest.
    """
    kind, colon, source = name.partition(":")
    if kind in WITHOUT_MODEL and not colon:
        return
    if kind == WITH_MODEL and source:
        return
    if kind in WITHOUT_MODEL:
        hint = f"{kind} takes nothing behind a colon"
    elif kind == WITH_MODEL:
        hint = f"{WITH_MODEL} needs a model: {WITH_MODEL}:./folder, {WITH_MODEL}:owner/name, any form of verifier.model"
    else:
        hint = near_miss(kind, [*WITHOUT_MODEL, WITH_MODEL])
    raise RegistryError(f"no baseline {name!r}; there are: {', '.join(FORMS)}", hint=hint)


def make_baseline(name: str, verifier: Engine, *, base: Path = Path(), progress: Progress = ignore) -> Baseline:
    """Returns the baseline of that name.

    Args:
        verifier: that it drafts for.
        base: the folder that a relative source starts from.
        progress: is told about a draft model's download and conversion.

    Raises:
        RegistryError: there is none of that name.
        SpeculatorsError: its model cannot be loaded, or has another tokenizer.
    """
    check_baseline(name)
    kind, _, source = name.partition(":")
    if kind in WITHOUT_MODEL:
        return Baseline(name, WITHOUT_MODEL[kind])
    model = load_draft_model(source, verifier, base=base, progress=progress)
    return Baseline(name, model.draft, model)
