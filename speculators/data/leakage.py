"""Finds benchmark prompts in the training data, exact or nearly so: a number measured on them means nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import attrs

Gram = tuple[str, ...]

# Share of a benchmark prompt's word 5-grams that a training prompt may have. One changed word costs a prompt of 15
# words up to 5 of its 11 5-grams, so above this share the question is the same, apart from a name or a number.
MAX_OVERLAP = 0.6


def five_grams(text: str) -> set[Gram]:
    """Splits a text into distinct word 5-grams, in lower case and without punctuation; a shorter text is one gram."""
    tokens = re.findall(r"\w+", text.lower())
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


def overlap(prompt: set[Gram], other: set[Gram]) -> float:
    """Computes the share of the first prompt's 5-grams that the other has, too."""
    return len(prompt & other) / len(prompt)


@attrs.frozen
class HeldOut:
    """One prompt of a benchmark suite: its first user turn."""

    suite: str
    id: str
    prompt: str


class Guard:
    """Finds the benchmark prompt nearest to a training prompt, with one look-up per 5-gram, however many there are.

    Args:
        held_out: the benchmark's prompts.
    """

    def __init__(self, held_out: Iterable[HeldOut]) -> None:
        self._prompts = list(held_out)
        self._sizes: list[int] = []
        self._places: defaultdict[Gram, list[int]] = defaultdict(list)
        for place, prompt in enumerate(self._prompts):
            grams = five_grams(prompt.prompt)
            self._sizes.append(len(grams))
            for gram in grams:
                self._places[gram].append(place)

    def nearest(self, prompt: str) -> tuple[float, HeldOut | None]:
        """Finds the benchmark prompt with the largest `overlap` with this training prompt, and that overlap."""
        shared = Counter(place for gram in five_grams(prompt) for place in self._places.get(gram, ()))
        if not shared:
            return 0.0, None
        place = max(shared, key=lambda place: (shared[place] / self._sizes[place], -place))
        return shared[place] / self._sizes[place], self._prompts[place]
