"""Live decoding: contenders take turns on the same prompts, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from speculators.bench.rows import JudgedResponse
from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.drafter import Drafter
from speculators.events import Progress, ProgressEvent, ignore
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter

WARM_UP_TOKENS = 8


@attrs.frozen(eq=False)
class Contender:
    """One way to decode.

    Attributes:
        name: in results.
        draft: makes a drafter that has seen nothing yet; None for plain decoding.
        num_tokens: tokens drafted per round (K); 0 for plain decoding.
    """

    name: str
    draft: Callable[[], Drafter] | None = None
    num_tokens: int = 0


@attrs.frozen(kw_only=True)
class LiveSettings:
    """How to decode.

    Attributes:
        temperature: of the verifier and of the drafts.
        token_filter: tokens that the verifier samples from.
        block_verification: judges a round's drafts as a block instead of token by token.
        max_new_tokens: length limit of a response; at T = 0 the row's own response is a limit, too.
        stop_ids: tokens that end a response.
        seed: of sampling; each prompt of each contender has its own generator.
        answer_tokens: length that the rows' own responses could have, of which `max_new_tokens` may be a part.
    """

    temperature: float
    token_filter: TokenFilter = ALL_TOKENS
    block_verification: bool = False
    max_new_tokens: int
    stop_ids: frozenset[int]
    seed: int = 0
    answer_tokens: int = 0


def run_live(
    model: Any,
    contenders: Sequence[Contender],
    rows: Sequence[JudgedResponse],
    settings: LiveSettings,
    *,
    progress: Progress = ignore,
) -> dict[str, list[Decoded]]:
    """Decodes every row's prompt with every contender, prompt by prompt.

    The contenders alternate, so that a machine that slows down slows all of them, and take turns to go first. Each
    decodes a few tokens beforehand, which do not count.

    Args:
        model: the verifier, a transformers causal language model.
        contenders: ways to decode; names are unique.
        rows: at least one; each has a prompt and the verifier's own response.
        settings: how to decode.
        progress: receives progress events.

    Returns:
        The responses of each contender, in the order of the rows.
    """
    warm_up = attrs.evolve(settings, max_new_tokens=min(WARM_UP_TOKENS, settings.max_new_tokens))
    for contender in contenders:
        _Decoder.of(model, contender).decode(rows[0], warm_up, seed=settings.seed)
    # New drafters: some remember responses, and the warm-up must not count among them.
    decoders = [_Decoder.of(model, contender) for contender in contenders]
    responses: dict[str, list[Decoded]] = {each.name: [] for each in contenders}
    total = len(rows) * len(contenders)
    for index, row in enumerate(rows):
        for turn in range(len(contenders)):
            which = (index + turn) % len(contenders)
            # Distinct for every (row, contender), and independent of whose turn it is.
            seed = (settings.seed * len(rows) + index) * len(contenders) + which
            decoded = decoders[which].decode(row, settings, seed=seed)
            responses[contenders[which].name].append(decoded)
            done = index * len(contenders) + turn + 1
            note = f"{contenders[which].name}: {len(decoded.tokens) / decoded.seconds:.1f} tokens/s"
            progress(ProgressEvent(stage="live", done=done, total=total, unit="responses", note=note))
    return responses


@attrs.frozen(eq=False)
class _Decoder:
    """A contender at work."""

    engine: CachedVerifier
    drafter: Drafter | None
    num_tokens: int

    @classmethod
    def of(cls, model: Any, contender: Contender) -> _Decoder:
        drafter = None if contender.draft is None else contender.draft()
        engine = CachedVerifier(model, () if drafter is None else drafter.target_layer_ids)
        return cls(engine, drafter, contender.num_tokens)

    def decode(self, row: JudgedResponse, settings: LiveSettings, *, seed: int) -> Decoded:
        # At T = 0 the verifier's own response is known, and its length is what replay judged.
        length = settings.max_new_tokens
        if settings.temperature == 0:
            length = min(length, len(row.response.answer))
        return decode(
            self.engine,
            self.drafter,
            torch.tensor(row.response.prompt, device=self.engine.device),
            max_new_tokens=length,
            num_tokens=self.num_tokens,
            temperature=settings.temperature,
            token_filter=settings.token_filter,
            block_verification=settings.block_verification,
            generator=torch.Generator(self.engine.device).manual_seed(seed),
            stop_ids=settings.stop_ids,
            longest=row.response.prompt_length + settings.answer_tokens,
        )
