"""What `spec data` finds out, as frozen values: the terminal, the JSON and the tests read the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

ERROR, WARNING, NOTE = "error", "warning", "note"


@attrs.frozen(kw_only=True)
class Finding:
    """One thing about the data that a person should know.

    Attributes:
        rule: short name of the check.
        level: "error" (the run is refused, or its number cannot be trusted), "warning" (it costs acceptance) or "note".
        found: what was found, in words.
        examples: rows that show it, with file and line where they are known.
        todo: what to do about it; "" where nothing needs to be done.
    """

    rule: str
    level: str
    found: str
    examples: tuple[str, ...] = ()
    todo: str = ""


@attrs.frozen
class Piece:
    """A stretch of a conversation's tokens that are all supervised or all not; a special token is a piece by itself."""

    text: str
    supervised: bool
    special: bool


@attrs.frozen(kw_only=True)
class Shown:
    """One conversation as the verifier sees it.

    Attributes:
        tokens: how many it has.
        supervised: how many of these are trained on.
        cut: it fills `max_tokens`, so that its end may be missing.
    """

    id: str
    tokens: int
    supervised: int
    cut: bool
    pieces: tuple[Piece, ...]


@attrs.frozen
class Bin:
    """How many conversations have `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@attrs.frozen(kw_only=True)
class Rows:
    """The prepared conversations in numbers.

    Attributes:
        folder: where the stage `prepare` keeps them.
        read: rows of the sources, those left out included.
        truncated: conversations cut at `max_tokens`.
        skipped: rows left out, by reason.
        quartiles: tokens of the shortest, first quarter's, median, third quarter's and longest conversation.
    """

    folder: str
    read: int
    conversations: int
    tokens: int
    supervised: int
    max_tokens: int
    truncated: int
    skipped: Mapping[str, int]
    quartiles: tuple[int, ...]
    histogram: tuple[Bin, ...]

    @property
    def supervised_share(self) -> float:
        """Returns the share of all tokens that is trained on."""
        return self.supervised / self.tokens


@attrs.frozen(kw_only=True)
class Vocabulary:
    """What a draft can say of what it is trained on.

    Attributes:
        size: of the draft vocabulary.
        of: of the verifier's.
        coverage: share of the supervised tokens that are in it.
        unseen: the same of conversations that were not counted: what to expect of new text.
        ends: tokens that end a turn or a text, all of them in it, with how often each is supervised.
        missing: special tokens that are supervised and not in it, likewise.
        most: the acceptance length on new text of a draft that errs nowhere else, by K.
    """

    size: int
    of: int
    coverage: float
    unseen: float
    ends: Mapping[str, int]
    missing: Mapping[str, int]
    most: Mapping[int, float]


@attrs.frozen(kw_only=True)
class Leakage:
    """What the training prompts share with the recipe's suites.

    Attributes:
        held_out: prompts by suite.
        same: training prompts that are a suite's prompt, apart from case and spacing.
        near: training prompts with more than `limit` of a suite prompt's word 5-grams.
        largest: largest such share of any training prompt that is not the same.
    """

    held_out: Mapping[str, int]
    same: int
    near: int
    largest: float
    limit: float


@attrs.frozen
class Measured:
    """The verifier's opinion of one conversation's supervised tokens."""

    id: str
    tokens: int
    log_probability: float
    agreement: float


@attrs.frozen(kw_only=True)
class OnPolicy:
    """How far the data is what the verifier itself says, over the supervised tokens of a sample, teacher-forced.

    Attributes:
        dtype: in which the verifier ran.
        tokens: supervised tokens of the sample.
        log_probability: mean, of the data's token, in nats.
        entropy: mean, of the verifier's distribution at these places, in nats.
        agreement: share of places at which the verifier's greedy token is the data's.
        ends: how many of the tokens end a turn.
        ends_agreement: share of these at which the verifier ends the turn, too; None without any.
        verdict: "greedy", "sampled" or "foreign"; see `lint.policy_verdict`.
        words: the consequence.
        conversations: each one of the sample.
    """

    dtype: str
    tokens: int
    log_probability: float
    perplexity: float
    entropy: float
    agreement: float
    ends: int
    ends_agreement: float | None
    verdict: str
    words: str
    conversations: tuple[Measured, ...]

    @property
    def excess(self) -> float:
        """Returns by how many nats a token surprises the verifier more than its own samples would: 0 for these."""
        return -self.log_probability - self.entropy


@attrs.frozen(kw_only=True)
class DataView:
    """All of it.

    Attributes:
        recipe: its name.
        sources: rows of each that are read, by what the recipe calls it.
        waiting: prompts whose answers are not generated yet; None where there are answers.
        rows: None where nothing could be prepared; a finding tells why.
        vocabulary: likewise.
        on_policy: None where it was not asked for, or there are no answers.
        marked: the chat template itself marks what the assistant generates.
        thinks: whether it asks for reasoning by default; None without such a switch.
        thinking_share: share of the conversations with a `<think>` block.
    """

    recipe: str
    sources: Mapping[str, int]
    waiting: int | None
    rows: Rows | None
    vocabulary: Vocabulary | None
    leakage: Leakage
    on_policy: OnPolicy | None
    marked: bool
    thinks: bool | None
    thinking_share: float
    findings: tuple[Finding, ...]
    shown: tuple[Shown, ...]

    @property
    def failed(self) -> bool:
        """Returns whether an error was found."""
        return any(finding.level == ERROR for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        values = attrs.asdict(self)
        if self.rows is not None:
            values["rows"]["supervised_share"] = self.rows.supervised_share
        if self.on_policy is not None:
            values["on_policy"]["excess"] = self.on_policy.excess
        return values
