"""What `spec data` finds out, as frozen values that the terminal, the JSON and the tests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from speculators.inspection.survey import SuiteOverlap

ERROR, WARNING, NOTE = "error", "warning", "note"


@attrs.frozen(kw_only=True)
class DataFinding:
    """One thing about the data that the user should know.

    Attributes:
        rule: short name of the check.
        level: ERROR (the run is refused, or its number cannot be trusted), WARNING (costs acceptance length) or NOTE.
        message: the finding, in a sentence.
        examples: rows that show it, with file and line where those are known.
        todo: what to do about it; "" where nothing needs to be done.
    """

    rule: str
    level: str
    message: str
    examples: tuple[str, ...] = ()
    todo: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON calls the message `found`, as it always did."""
        return {
            "rule": self.rule,
            "level": self.level,
            "found": self.message,
            "examples": list(self.examples),
            "todo": self.todo,
        }


@attrs.frozen
class TextSpan:
    """A stretch of a conversation, all of it supervised or none of it; a special token is a span of its own.

    Attributes:
        kind: reasoning, tool calls or tool results, by their names in `inspection.kinds`; "" for anything else.
    """

    text: str
    supervised: bool
    special: bool
    kind: str = ""


@attrs.frozen(kw_only=True)
class RenderedConversation:
    """One conversation as the verifier sees it.

    Attributes:
        tokens: its length.
        supervised: how many of these tokens are trained on.
        cut: it fills `max_tokens`, so that its end may be missing.
    """

    id: str
    tokens: int
    supervised: int
    cut: bool
    pieces: tuple[TextSpan, ...]


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
        read: rows of the sources, including those left out.
        truncated: conversations cut at `max_tokens`.
        skipped: number of rows left out, by reason.
        quartiles: tokens of the conversations at 0, 25, 50, 75 and 100% of the lengths.
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
        """The share of all tokens that is trained on."""
        return self.supervised / self.tokens


@attrs.frozen(kw_only=True)
class Vocabulary:
    """How much of the data the draft vocabulary can say.

    Attributes:
        size: tokens of the draft vocabulary.
        of: tokens of the verifier's vocabulary.
        coverage: share of the supervised tokens that are in the draft vocabulary.
        unseen: the same for conversations that were not counted: what to expect of new text.
        ends: how often each token that ends a turn or a text is supervised; all of them are in the draft vocabulary.
        missing: how often each special token outside the draft vocabulary is supervised.
        most: by K, the acceptance length on new text of a draft without any other error.
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
        suites: by name; their numbers are those of `SuiteOverlap`.
        same: training prompts that equal a prompt of any suite.
        near: other training prompts with more than `limit` of the word 5-grams of a prompt of any suite.
    """

    suites: Mapping[str, SuiteOverlap]
    same: int
    near: int
    limit: float


@attrs.frozen
class ConversationScore:
    """How the verifier scores the supervised tokens of one conversation: means over its tokens."""

    id: str
    tokens: int
    log_probability: float
    agreement: float


@attrs.frozen(kw_only=True)
class OnPolicy:
    """How far the data is what the verifier itself would say, teacher-forced over a sample's supervised tokens.

    Attributes:
        dtype: the precision in which the verifier ran.
        tokens: supervised tokens of the sample.
        log_probability: mean log-probability of the data's tokens, in nats.
        entropy: mean entropy of the verifier's distribution at these places, in nats.
        agreement: share of places at which the verifier's greedy token is the data's.
        ends: how many of the tokens end a turn.
        ends_agreement: share of these at which the verifier ends the turn too; None without any.
        verdict: "greedy", "sampled" or "foreign"; see `lint.policy_verdict`.
        consequence: what the verdict means for training, in a sentence.
        conversations: one score for each conversation of the sample.
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
    consequence: str
    conversations: tuple[ConversationScore, ...]

    @property
    def excess(self) -> float:
        """By how many nats per token the data surprises the verifier more than its own samples, which give 0."""
        return -self.log_probability - self.entropy

    def to_json(self) -> dict[str, Any]:
        """JSON calls the consequence `words`, as it always did."""
        values = {"words" if key == "consequence" else key: value for key, value in attrs.asdict(self).items()}
        return {**values, "excess": self.excess}


@attrs.frozen(kw_only=True)
class DataView:
    """The whole result of `spec data`.

    Attributes:
        recipe: its name.
        sources: number of rows read, by the recipe's name for the source.
        waiting: prompts whose answers are not generated yet; None once there are answers.
        rows, vocabulary: None where nothing could be prepared; a finding says why.
        on_policy: None where it was not asked for, or there are no answers.
        marked: whether the chat template itself marks what the assistant generates.
        thinks: whether the template asks for reasoning by default; None if it has no such switch.
        thinking_share: share of the conversations with reasoning.
        kinds: number of conversations that have each kind of `inspection.kinds`.
        dropped: those of these kinds that the chat template does not show.
        answers: the file in which `[data.regenerate]` keeps the verifier's answers; "" for data that is used as it is.
        findings: the gravest first.
        shown: the conversations to print.
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
    kinds: Mapping[str, int] = attrs.field(factory=dict)
    dropped: tuple[str, ...] = ()
    answers: str = ""
    findings: tuple[DataFinding, ...] = ()
    shown: tuple[RenderedConversation, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.level == ERROR for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The values that `spec data --json` prints."""
        values = attrs.asdict(self)
        values["findings"] = [finding.to_json() for finding in self.findings]
        if self.rows is not None:
            values["rows"]["supervised_share"] = self.rows.supervised_share
        if self.on_policy is not None:
            values["on_policy"] = self.on_policy.to_json()
        return values
