"""A response with the verifier's hidden states and probabilities: the input of replay."""

from __future__ import annotations

import attrs
import torch

from speculators.chunks import CHUNKS
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.token_filter import filtered
from speculators.verifier.weights import VerifierHead


@attrs.frozen(kw_only=True)
class Response:
    """A prompt and its response.

    Attributes:
        id: the prompt's; its turns share it.
        category: the prompt's.
        tokens: [n] of prompt and response.
        prompt_length: number of prompt tokens; the response follows.
    """

    id: str
    category: str
    tokens: tuple[int, ...]
    prompt_length: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.tokens[: self.prompt_length]

    @property
    def answer(self) -> tuple[int, ...]:
        """The response's tokens."""
        return self.tokens[self.prompt_length :]


@attrs.frozen(eq=False, kw_only=True)
class JudgedResponse:
    """A response that the verifier itself produced, with the states that drafts are made from.

    Attributes:
        response: at T = 0, cut before the first token that is not the verifier's argmax.
        hidden_states: [n, A*H] of all its tokens.
        log_p: [m] log-probability that the verifier gives each response token at the temperature, among the tokens
            that it samples from; None at T = 0, where it is zero everywhere.
        cut: number of response tokens that were cut off.
        unlikely: number of response tokens that the filter of the verifier's tokens drops, here if not where they were
            sampled; see `judge`.
        replaced: whether it was generated because the suite's own answer is not this verifier's.
    """

    response: Response
    hidden_states: torch.Tensor
    log_p: torch.Tensor | None
    cut: int
    unlikely: int = 0
    replaced: bool = False


@torch.no_grad()
def judge(
    head: VerifierHead,
    response: Response,
    hidden_states: torch.Tensor,
    last: torch.Tensor,
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
) -> JudgedResponse:
    """Checks at T = 0 that a response is the verifier's own; computes its probabilities at T > 0.

    A prefix of a greedy output is a greedy output. So at T = 0 the response is cut before the first token that is not
    the verifier's argmax, and replay of the rest is exact.

    A token at the edge of a filter may be kept where it was sampled and dropped here, because rounding differs. It was
    emitted, so it counts among the tokens that are kept.

    Args:
        head: the verifier's final norm and head over its whole vocabulary, in float32.
        response: n tokens, prompt included.
        hidden_states: [n, A*H].
        last: [n, H] the last layer's output before the final norm.
        temperature: that the response was generated at.
        token_filter: tokens that it was sampled from.
    """
    start, end = response.prompt_length, len(response.tokens)
    answer = torch.tensor(response.answer, dtype=torch.int64, device=last.device)
    # All logits at once would not fit.
    step = max(1, CHUNKS[last.device.type].judged_elements // head.weight.shape[0])
    log_p, unlikely = [], 0
    for first in range(start, end, step):
        stop = min(first + step, end)
        # The state at place i - 1 yields the token at place i.
        logits = head.logits(last[first - 1 : stop - 1].to(head.weight.dtype)).float()  # [step, V]
        emitted = answer[first - start : stop - start]
        if temperature == 0:
            foreign = (logits.argmax(dim=-1) != emitted).nonzero()
            if len(foreign):
                end = first + int(foreign[0])
                break
        else:
            whole = logits / temperature
            kept = filtered(whole, token_filter)
            unlikely += int(kept.gather(-1, emitted[:, None]).isneginf().sum())
            kept = kept.scatter(-1, emitted[:, None], whole.gather(-1, emitted[:, None]))
            log_p.append(log_probability(kept, emitted))
    return JudgedResponse(
        response=attrs.evolve(response, tokens=response.tokens[:end]),
        hidden_states=hidden_states[:end],
        log_p=torch.cat(log_p) if log_p else None,
        cut=len(response.tokens) - end,
        unlikely=unlikely,
    )


def shortened(row: JudgedResponse, length: int | None) -> JudgedResponse:
    """Cuts the response to its first `length` tokens, which are the verifier's own output, too; None keeps all."""
    if length is None or length >= len(row.response.answer):
        return row
    end = row.response.prompt_length + length
    return attrs.evolve(
        row,
        response=attrs.evolve(row.response, tokens=row.response.tokens[:end]),
        hidden_states=row.hidden_states[:end],
        log_p=None if row.log_p is None else row.log_p[:length],
    )


def log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Computes log softmax(logits)[token], [n], from logits [n, V] and tokens [n], without forming the softmax."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
