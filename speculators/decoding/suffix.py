"""Suffix decoding: drafts what most often followed the sequence's last tokens, in it and in past responses."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import attrs
import numpy as np
import torch

from speculators.drafter import Proposal, chain

# Stands between two responses: it is no token, so no match crosses it, and it is never drafted.
END = -1


@attrs.frozen
class Continuation:
    """What probably comes next.

    Attributes:
        tokens: the most frequent continuation.
        score: how many of them are expected to be right, by their frequencies.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0


class Text:
    """Tokens, and the places of each.

    A match that is lengthened token by token through these places visits the counts that a suffix tree holds, without
    a tree to keep.
    """

    def __init__(self) -> None:
        self.tokens = array("q")
        self._places: dict[int, array[int]] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            self._places.setdefault(token, array("q")).append(len(self.tokens))
            self.tokens.append(token)

    def continuation(self, recent: array[int], num_tokens: int, min_probability: float) -> Continuation:
        """Returns the best continuation of `recent` over all lengths of its suffix that occur here.

        Args:
            recent: the last tokens of a sequence; none of them is drafted further than as many tokens as are matched.
            num_tokens: longest continuation.
            min_probability: it ends before the first token that is less probable than this.
        """
        best = Continuation()
        if recent[-1] not in self._places:
            return best
        # Views: `extend` cannot grow an array while one is alive, and none outlives this call.
        tokens = np.frombuffer(self.tokens, dtype=np.int64)
        next_places = np.frombuffer(self._places[recent[-1]], dtype=np.int64) + 1
        next_places = next_places[next_places < len(tokens)]
        matched = 1
        while len(next_places):
            longer = next_places[:0]
            if matched < len(recent):
                before = next_places - matched - 1
                longer = next_places[(before >= 0) & (tokens[before] == recent[-matched - 1])]
            # Where all places match further, the longer match drafts the same and more.
            if len(longer) < len(next_places):
                found = _most_frequent(tokens, next_places, min(num_tokens, matched), min_probability)
                best = found if found.score >= best.score else best
            next_places, matched = longer, matched + 1
        return best


def _most_frequent(tokens: np.ndarray, places: np.ndarray, limit: int, min_probability: float) -> Continuation:
    """Walks from `places` [m] along the most frequent next token; of equals, the one that occurred last."""
    drafted: list[int] = []
    score, total = 0.0, len(places)
    for _ in range(limit):
        places = places[places < len(tokens)]
        following, last, counts = np.unique(tokens[places][::-1], return_index=True, return_counts=True)
        counts[following == END] = 0
        if not counts.any() or counts.max() < min_probability * total:
            break
        often = np.flatnonzero(counts == counts.max())
        pick = often[last[often].argmin()]
        drafted.append(int(following[pick]))
        score += counts[pick] / total
        places = places[tokens[places] == following[pick]] + 1
    return Continuation(tuple(drafted), score)


class SuffixState:
    """One sequence's tokens, and where its response begins."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self.text = Text()
        self.text.extend(tokens)
        self.start = len(self.text.tokens) - 1


class SuffixDrafter:
    """Drafts deterministically (no probabilities), the further the longer the match; nothing without a match.

    Both the sequence itself and the responses finished before it are searched; the continuation that expects more
    accepted tokens is drafted. One sequence is decoded at a time: its response counts as past when the next begins.

    Args:
        longest: tokens of the longest suffix that is looked up.
        min_probability: estimated from the counts; a draft ends before a token that is less probable.

    Source: Oliaro et al. 2411.04975, section 3, chains; defaults of its implementation in vLLM (at most one drafted
    token a matched one). Counts are of occurrences that go on.
    """

    target_layer_ids: tuple[int, ...] = ()

    def __init__(self, *, longest: int = 24, min_probability: float = 0.1) -> None:
        self.longest = longest
        self.min_probability = min_probability
        self._past = Text()
        self._current: SuffixState | None = None

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> SuffixState:
        """Starts a sequence; see `Drafter`."""
        if self._current is not None:
            self._past.extend([*self._current.text.tokens[self._current.start :], END])
        self._current = SuffixState(tokens.tolist())
        return self._current

    def propose(
        self, state: SuffixState, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts up to `num_tokens` tokens; see `Drafter`."""
        recent = state.text.tokens[-self.longest :]
        own, past = (text.continuation(recent, num_tokens, self.min_probability) for text in (state.text, self._past))
        best = past if past.score > own.score else own
        return chain(torch.tensor(best.tokens, dtype=torch.int64))

    def advance(self, state: SuffixState, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Takes in what a round emitted; see `Drafter`."""
        state.text.extend(tokens.tolist())
