"""The verifier's responses to a suite: its own answers where they are the verifier's, otherwise generated ones.

A later turn's history is what a server would get: the message that it made of the answer, rendered by the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from speculators.bench.rows import JudgedResponse, Response, judge
from speculators.bench.suites import Prompt
from speculators.data.messages import Message, Written
from speculators.data.replies import AnswerReader
from speculators.data.template import ChatTemplate
from speculators.data.written import from_other_tokenizer
from speculators.errors import DataError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.weights import VerifierHead

# Tokens: suites are cut by max_new_tokens, not by the template.
UNLIMITED = 2**31 - 1
# Share of sampled tokens that rounding may move across the edge of a filter. Answers sampled without top_p = 0.95 have
# about 5% of their tokens outside it.
MOST_UNLIKELY = 0.02


def respond(
    engine: RespondingVerifier,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    max_new_tokens: int,
    seed: int = 0,
    progress: Progress = ignore,
) -> list[Response]:
    """Obtains a response to each turn of each prompt, in the order of the prompts.

    At T = 0 the suite's own answer is used where it has one (and judged later); everything else is generated. A later
    turn sees the verifier's own answers to the turns before it.

    Args:
        engine: the verifier.
        prompts: of a suite.
        temperature: of the verifier.
        token_filter: tokens that it samples from.
        max_new_tokens: length limit; a token that ends the turn ends a response earlier.
        seed: of the sampling.
        progress: receives progress events.

    Raises:
        DataError: the chat template cannot encode a prompt.
    """
    template = ChatTemplate.of(engine.tokenizer)
    reader = AnswerReader.of(template)
    # By (index of the prompt, turn).
    responses: dict[tuple[int, int], Response] = {}
    open_turns: list[tuple[int, tuple[Message, ...]]] = []
    for index, prompt in enumerate(prompts):
        if temperature == 0 and prompt.answer is not None:
            responses[index, 0] = _answered(template, prompt, engine.stop_ids, max_new_tokens)
        else:
            open_turns.append((index, prompt.messages))
    turn = 0
    while open_turns:
        ids = [prompts[index].ids(template, messages) for index, messages in open_turns]
        outputs = engine.generate(
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            token_filter=token_filter,
            seed=seed + turn,
            progress=progress,
        )
        next_turns: list[tuple[int, tuple[Message, ...]]] = []
        for (index, messages), start, output in zip(open_turns, ids, outputs, strict=True):
            prompt = prompts[index]
            tokens = (*start, *output)
            responses[index, turn] = Response(
                id=prompt.id, category=prompt.category, tokens=tokens, prompt_length=len(start)
            )
            if turn < len(prompt.later):
                reply = reader.read(engine.tokenizer, start, output, engine.stop_ids)
                next_turns.append((index, (*messages, reply, Message("user", prompt.later[turn]))))
        open_turns = next_turns
        turn += 1
    return [responses[key] for key in sorted(responses)]


def capture_rows(
    engine: RespondingVerifier,
    head: VerifierHead,
    responses: Sequence[Response],
    layer_ids: Sequence[int],
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    max_new_tokens: int = 0,
    progress: Progress = ignore,
) -> list[JudgedResponse]:
    """Captures hidden states of the responses and judges each one, in their order; see `judge`.

    Args:
        engine: the verifier.
        head: over the verifier's whole vocabulary, on the engine's device.
        responses: of the verifier.
        layer_ids: layers whose hidden states the speculator reads.
        temperature: that the responses were generated at.
        token_filter: tokens that they were sampled from.
        max_new_tokens: the length limit that they were generated with; 0 for their own lengths.
        progress: receives progress events.
    """
    tokens = [torch.tensor(response.tokens) for response in responses]
    rows: dict[int, JudgedResponse] = {}
    longest = [max(len(each.tokens), each.prompt_length + max_new_tokens) for each in responses]
    sampled: dict[str, Any] = {"temperature": temperature, "token_filter": token_filter}
    for index, states, last in engine.capture_all(tokens, layer_ids, longest=longest):
        rows[index] = judge(head, responses[index], states, last, **sampled)
        progress(ProgressEvent(stage="bench", done=len(rows), total=len(tokens), unit="responses", note="capture"))
    return [rows[index] for index in range(len(rows))]


def own_rows(
    engine: RespondingVerifier,
    head: VerifierHead,
    prompts: Sequence[Prompt],
    layer_ids: Sequence[int],
    *,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    max_new_tokens: int,
    seed: int = 0,
    progress: Progress = ignore,
) -> list[JudgedResponse]:
    """Obtains the verifier's own responses to a suite, judged, in the order of the prompts.

    An answer of the suite that is not this verifier's (another model's, or another machine's rounding) is replaced by a
    generated one, and its row says so. Tokens that even then are not the verifier's argmax are cut off.

    Raises:
        DataError: the template cannot encode a prompt, or the answers were not sampled as asked.
    """

    sampled: dict[str, Any] = {
        "temperature": temperature,
        "token_filter": token_filter,
        "max_new_tokens": max_new_tokens,
    }

    def answers(to: Sequence[Prompt]) -> list[Response]:
        return respond(engine, to, seed=seed, progress=progress, **sampled)

    rows = capture_rows(engine, head, answers(prompts), layer_ids, progress=progress, **sampled)
    # The turns of a prompt share its id, so rows are matched by their prompt tokens as well.
    foreign = {row.response.id for row in rows if row.cut}
    again = [attrs.evolve(prompt, answer=None) for prompt in prompts if prompt.id in foreign and prompt.answer]
    if again:
        redone = capture_rows(engine, head, answers(again), layer_ids, **sampled)
        by_id = {(row.response.id, row.response.prompt): attrs.evolve(row, replaced=True) for row in redone}
        rows = [by_id.get((row.response.id, row.response.prompt), row) for row in rows]
    _check_filter(rows, token_filter)
    return rows


def _check_filter(rows: Sequence[JudgedResponse], token_filter: TokenFilter) -> None:
    """Raises DataError if more response tokens lie outside the filter than rounding explains."""
    tokens, unlikely = sum(len(row.response.answer) for row in rows), sum(row.unlikely for row in rows)
    if unlikely > MOST_UNLIKELY * tokens:
        raise DataError(
            f"{unlikely} of {tokens} tokens of the answers would not have been sampled with {token_filter}",
            hint="check that the server follows top_p, top_k and min_p of its requests",
        )


def sample_rows(rows: Sequence[JudgedResponse], number: int | None) -> list[int]:
    """Picks the indices of up to `number` rows with a round, spread evenly over the suite; None picks all of them."""
    usable = [index for index, row in enumerate(rows) if len(row.response.answer) > 1]
    if number is None or number >= len(usable):
        return usable
    return [usable[place] for place in np.linspace(0, len(usable) - 1, number).round().astype(int)]


def _answered(template: ChatTemplate, prompt: Prompt, stop_ids: Sequence[int], max_new_tokens: int) -> Response:
    """Splits the rendered conversation into prompt and response, which ends with the turn or at the limit."""
    if prompt.written is not None and not _fits(template, prompt, prompt.written):
        prompt = attrs.evolve(prompt, written=None)
    encoded = template.encode(prompt.conversation, UNLIMITED)
    if isinstance(encoded, str):
        raise DataError(f"prompt {prompt.id}: {encoded}")
    # Only the answer is supervised.
    (row,) = encoded
    start, end = list(_runs(row.loss_mask))[-1]
    tokens = row.input_ids[:end].tolist()
    end = next((place + 1 for place in range(start, end) if tokens[place] in stop_ids), end)
    tokens = tokens[: min(end, start + max_new_tokens)]
    return Response(id=prompt.id, category=prompt.category, tokens=tuple(tokens), prompt_length=start)


def _fits(template: ChatTemplate, prompt: Prompt, written: Written) -> bool:
    """Whether ids that came with a suite are this tokenizer's and answer the prompt as this template renders it."""
    return list(written.prompt) == prompt.ids(template) and not from_other_tokenizer(template.tokenizer, [written])


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each run of true entries."""
    # Padded with False on both sides, a run begins at +1 and ends at -1 of the difference.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
