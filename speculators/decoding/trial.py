"""Tries a verifier's live decoding on a few tokens, before a run spends anything on it."""

from __future__ import annotations

import torch

from speculators.decoding.target import CachedVerifier
from speculators.drafter import chain
from speculators.errors import VerifierError
from speculators.facts import reason
from speculators.verifier.engine import Engine

# By how much logits may differ, as the norm of the difference relative to their own: in float32 only sums in another
# order do, in 16 bits a token may also be routed to other experts.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25}
_PROMPT = 8
_HINT = 'nothing was spent; with "benchmark.suites = []" the speculator is trained without being measured here'


def check_decodes(engine: Engine) -> None:
    """Decodes with a draft that is accepted and one that is rejected, and compares with forwards of whole sequences.

    Raises:
        VerifierError: a forward with the cache fails, or gives other logits.
    """
    name = type(engine.model).__name__
    try:
        pairs = _logits(engine)
    except VerifierError:
        raise
    # transformers and a model's own code may raise anything.
    except Exception as error:
        message = f"{name}: decoding with drafts fails: {type(error).__name__}: {reason(error)}"
        raise VerifierError(f"{engine.folder}: {message}", hint=_HINT) from error
    allowed = _ALLOWED[str(engine.dtype).removeprefix("torch.")]
    for moment, cached, whole in pairs:
        difference = float((cached.float() - whole.float()).norm() / whole.float().norm().clamp_min(1e-30))
        if not difference <= allowed:
            message = f"{name}: logits {moment} differ by {difference:.2g} of their size from a forward of all tokens"
            raise VerifierError(f"{engine.folder}: {message} (at most {allowed:g} is rounding)", hint=_HINT)


@torch.inference_mode()
def _logits(engine: Engine) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Pairs of logits [V], with the cache and of whole forwards, and the moment that they belong to."""
    vocabulary = engine.facts.vocab_size
    tokens = (torch.arange(_PROMPT + 3) * 7 + 3) % vocabulary
    wrong = (tokens[-2:] + 1) % vocabulary
    verifier = CachedVerifier(engine.model, (engine.num_layers,))

    def whole(count: int) -> torch.Tensor:
        ids = tokens[None, :count].to(engine.device)
        logits: torch.Tensor = engine.model(input_ids=ids, use_cache=False).logits
        return logits[0, -1]

    prompt, _ = verifier.prefill(tokens[:_PROMPT])
    # The first draft is the token that follows, the others are not.
    scored, _ = verifier.score(int(tokens[_PROMPT]), chain(torch.cat([tokens[_PROMPT + 1 : _PROMPT + 2], wrong])))
    verifier.keep((0,))
    after, _ = verifier.score(int(tokens[_PROMPT + 2]))
    return [
        ("after the prompt", prompt, whole(_PROMPT)),
        ("of a draft", scored[1], whole(_PROMPT + 2)),
        ("after a rejected draft", after[0], whole(_PROMPT + 3)),
    ]
