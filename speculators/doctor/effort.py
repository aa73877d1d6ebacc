"""How much an examination measures: all of it, or what answers in seconds."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Effort:
    """How much an examination measures.

    Attributes:
        prompts: most prompts to answer.
        new_tokens: most tokens of an answer.
        sample: answers on which every alternative is tried.
        keep: alternatives that are tried on all answers.
        thorough: also tries rare alternatives, and measures long contexts, 16 bits and the run's data.
    """

    prompts: int
    new_tokens: int
    sample: int
    keep: int
    thorough: bool


# A few thousand drafts separate a 3% change of the accepted drafts from chance.
FULL = Effort(prompts=32, new_tokens=128, sample=8, keep=8, thorough=True)
QUICK = Effort(prompts=20, new_tokens=48, sample=5, keep=3, thorough=False)
LEFT_OUT = "left out by --quick"
