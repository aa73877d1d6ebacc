"""Suffix decoding: drafts the tokens that most often followed the last ones, in this sequence and in past responses."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import attrs
import numpy as np
import numpy.typing as npt
import torch

from speculators.drafter import Proposal, chain

# Separates two responses. It is not a token, so no match crosses it and it is never drafted.
END = -1


@attrs.frozen
class Continuation:
    """The most frequent continuation of some tokens.

    Attributes:
        tokens: of the continuation.
        score: how many of them are expected to be right, by their frequencies.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0


class Text:
    """Tokens, and an index of the places of each.

    Lengthening a match token by token through these places visits the same counts as a walk through a suffix tree,
    without a tree to maintain.
    """

    def __init__(self) -> None:
        self.tokens = array("q")
        self._places: dict[int, array[int]] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            self._places.setdefault(token, array("q")).append(len(self.tokens))
            self.tokens.append(token)

    def continuation(
        self, recent: array[int], num_tokens: int, *, shortest: int, min_probability: float
    ) -> Continuation:
        """Finds the best-scored continuation of `recent`, over all lengths of its suffix that occur in the text.

        Args:
            recent: the last tokens of a sequence; a match of n tokens drafts at most n.
            num_tokens: length of the continuation at most.
            shortest: least length of the suffix.
            min_probability: the continuation ends before the first token that is less probable.
        """
        best = Continuation()
        if recent[-1] not in self._places:
            return best
        # Views on the arrays; `extend` cannot grow an array while a view is alive, so none may outlive this call.
        tokens = np.frombuffer(self.tokens, dtype=np.int64)
        next_places = np.frombuffer(self._places[recent[-1]], dtype=np.int64) + 1
        next_places = next_places[next_places < len(tokens)]
        matched = 1
        while len(next_places):
            longer = next_places[:0]
            if matched < len(recent):
                before = next_places - matched - 1
                longer = next_places[(before >= 0) & (tokens[before] == recent[-matched - 1])]
            # If all places match further, the longer match drafts the same and more.
            if matched >= shortest and len(longer) < len(next_places):
                continuation = _most_frequent(tokens, next_places, min(num_tokens, matched), min_probability)
                # Of equal scores the longer match wins.
                best = continuation if continuation.score >= best.score else best
            next_places, matched = longer, matched + 1
        return best


def _most_frequent(
    tokens: npt.NDArray[np.int64], places: npt.NDArray[np.int64], limit: int, min_probability: float
) -> Continuation:
    """Walks from `places` [m] along the most frequent next token; among equals, the one that occurred last."""
    drafted: list[int] = []
    score, total = 0.0, len(places)
    for _ in range(limit):
        places = places[places < len(tokens)]
        # Reversed, so that the index of a token's first occurrence is that of its last.
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
    """The tokens of one sequence, and the index `start` of its response."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self.text = Text()
        self.text.extend(tokens)
        self.start = len(self.text.tokens) - 1


class SuffixDrafter:
    """Drafts deterministically, without probabilities; longer matches draft more, no match drafts nothing.

    Searches the sequence itself and the responses finished before it, and drafts the continuation that expects more
    accepted tokens. One sequence is decoded at a time: its response counts as past when the next begins.

    Args:
        longest: length of the longest suffix to look up, in tokens.
        shortest: length of the shortest suffix to look up.
        min_probability: estimated from the counts; a draft ends before a token that is less probable.

    Source: Oliaro et al. 2411.04975, section 3, chains only; with the defaults of vLLM's implementation, which drafts
    at most one token per matched one. Only occurrences that have a successor are counted.
    """

    target_layer_ids: tuple[int, ...] = ()

    def __init__(self, *, longest: int = 24, shortest: int = 1, min_probability: float = 0.1) -> None:
        self.longest = longest
        self.shortest = shortest
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
        own, past = (
            text.continuation(recent, num_tokens, shortest=self.shortest, min_probability=self.min_probability)
            for text in (state.text, self._past)
        )
        best = past if past.score > own.score else own
        return chain(torch.tensor(best.tokens, dtype=torch.int64))

    def advance(self, state: SuffixState, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens that a round emitted; see `Drafter`."""
        state.text.extend(tokens.tolist())
