"""Benchmark prompts that training has seen, word for word or nearly: a number measured on them means nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import attrs

Gram = tuple[str, ...]

# Of a benchmark prompt's word 5-grams, what one training prompt may share: one changed word costs a prompt of 15 words
# up to 5 of its 11, so above this share the question is the same and little else than a name or a number differs.
MAX_OVERLAP = 0.6


def five_grams(text: str) -> set[Gram]:
    """The distinct word 5-grams of a text (the whole text, when it is shorter), in lower case, without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def overlap(prompt: set[Gram], other: set[Gram]) -> float:
    """The share of the first prompt's 5-grams that the other has too."""
    return len(prompt & other) / len(prompt)


@attrs.frozen
class HeldOut:
    """One prompt of a benchmark suite: its first user turn."""

    suite: str
    id: str
    prompt: str


class Guard:
    """Finds, for training prompts, the benchmark prompt that is nearest; one look-up a 5-gram, however many there are.

    Args:
        held_out: the benchmark's prompts.
    """

    def __init__(self, held_out: Iterable[HeldOut]) -> None:
        self._prompts = list(held_out)
        self._sizes: list[int] = []
        self._places: defaultdict[Gram, list[int]] = defaultdict(list)
        for place, held in enumerate(self._prompts):
            grams = five_grams(held.prompt)
            self._sizes.append(len(grams))
            for gram in grams:
                self._places[gram].append(place)

    def nearest(self, prompt: str) -> tuple[float, HeldOut | None]:
        """Returns the largest `overlap` of a benchmark prompt with this training prompt, and that benchmark prompt."""
        shared = Counter(place for gram in five_grams(prompt) for place in self._places.get(gram, ()))
        if not shared:
            return 0.0, None
        place = max(shared, key=lambda place: (shared[place] / self._sizes[place], -place))
        return shared[place] / self._sizes[place], self._prompts[place]
