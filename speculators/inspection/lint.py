"""What is wrong with the data, or may be: each finding with its level, an example and what to do.

An "error" is a run that would be refused, or whose number could not be trusted; a "warning" costs acceptance length; a
"note" is something to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from speculators.data.conversations import LAYOUT, NO_ANSWER, NO_MESSAGES, NOT_ALTERNATING
from speculators.data.prepare import MENDS
from speculators.data.template import REWRITES_HISTORY
from speculators.inspection.survey import Survey, short_path
from speculators.inspection.view import ERROR, NOTE, WARNING, Finding, Leakage, OnPolicy, Rows, Vocabulary

# Of all rows: a reason that costs more is a warning; if all reasons together cost more, the run is not the recipe's.
FEW, MOST = 0.01, 0.5
# A draft that errs nowhere else loses a token of acceptance length at K = 5 where it can say 93% of the tokens.
LEAST_COVERAGE = 0.93
# Rows that are cut lose their ends, and with them the tokens that end a turn.
MANY_TRUNCATED = 0.1
# Answers made by greedy decoding agree but for rounding (another dtype, another batch) and for answers cut short.
GREEDY_AGREEMENT = 0.95
# In nats a token. Samples of the verifier surprise it by its entropy, no more: what is beyond was written by another.
# Over a thousand tokens chance makes this differ from 0 by about 0.03.
FOREIGN_EXCESS = 0.1
# Of the turns' ends. An answer that the length limit cut ends where the verifier would have gone on.
LEAST_ENDS = 0.8

CURES = {
    **MENDS,
    NOT_ALTERNATING: "turns go user, assistant, user, assistant, ... after at most one system message: mend the rows",
    NO_ANSWER: "add answers: [data.regenerate] lets the verifier write them",
    NO_MESSAGES: LAYOUT,
    REWRITES_HISTORY: "train on one turn a row, or regenerate: earlier turns are served without their reasoning",
}


@attrs.frozen(kw_only=True)
class Looked:
    """What the rules go by.

    Attributes:
        refused: why the stage `prepare` refused the data; "" where it did not, or was not asked.
        examples: a conversation that the chat template could not encode, by reason.
        thinking_share: share of the conversations with a `<think>` block.
        takes: by source, where the recipe takes only the first so many rows.
    """

    survey: Survey
    leakage: Leakage
    rows: Rows | None
    vocabulary: Vocabulary | None
    on_policy: OnPolicy | None
    waiting: int | None
    refused: str
    examples: Mapping[str, str]
    marked: bool
    thinks: bool | None
    thinking_share: float
    takes: Mapping[str, int]


def lint(looked: Looked) -> tuple[Finding, ...]:
    """Returns all findings, the gravest first."""
    found = [*_leaks(looked), *_rows(looked), *_template(looked), *_vocabulary(looked), *_policy(looked)]
    return tuple(sorted(found, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level)))


def _leaks(looked: Looked) -> Iterator[Finding]:
    survey, leakage = looked.survey, looked.leakage
    if leakage.same:
        yield Finding(
            rule="leakage",
            level=ERROR,
            found=f"{leakage.same} training prompts are prompts of the benchmark: spec run refuses them",
            examples=tuple(survey.examples[Survey.SAME]),
            todo="take them out of the sources, or benchmark on another suite",
        )
    if leakage.near:
        yield Finding(
            rule="near-duplicates",
            level=WARNING,
            found=f"{leakage.near} training prompts have more than {leakage.limit:.0%} of a benchmark prompt's 5-grams",
            examples=tuple(survey.examples[Survey.NEAR]),
            todo="look at them: if the question is the same, take them out",
        )
    if repeated := survey.counts[Survey.REPEATED]:
        yield Finding(
            rule="repeated prompts",
            level=NOTE,
            found=f"{repeated} conversations start with a prompt that an earlier one has: it counts several times",
            examples=tuple(survey.examples[Survey.REPEATED]),
            todo="drop them, unless they are several samples of the answer",
        )


def _rows(looked: Looked) -> Iterator[Finding]:
    rows, survey = looked.rows, looked.survey
    reasons, read = rows.skipped if rows else survey.reasons, survey.rows.total()
    if looked.refused:
        message, _, hint = looked.refused.partition("\n")
        yield Finding(rule="nothing to train on", level=ERROR, found=message, todo=hint)
    if sum(reasons.values()) > MOST * read:
        yield Finding(
            rule="rows left out",
            level=ERROR,
            found=f"{sum(reasons.values())} of {read} rows are left out: the data is not what the recipe says",
            todo="see the reasons",
        )
    for reason, count in reasons.items():
        example = (looked.examples[reason],) if reason in looked.examples else tuple(survey.examples[reason])
        level = WARNING if count > FEW * read else NOTE
        found = f"{count} of {read} rows are left out: {reason}"
        yield Finding(rule="rows left out", level=level, found=found, examples=example, todo=CURES.get(reason, ""))
    for source, take in looked.takes.items():
        if survey.rows[source] == take:
            found = f"{short_path(source)}: the recipe takes the first {take} rows, and no more"
            yield Finding(rule="take", level=NOTE, found=found)
    if rows and rows.truncated > MANY_TRUNCATED * rows.conversations:
        yield Finding(
            rule="truncated",
            level=WARNING,
            found=f"{rows.truncated} of {rows.conversations} conversations are cut at {rows.max_tokens} tokens",
            todo="raise data.max_tokens; ends of turns and long contexts are otherwise not learnt",
        )


def _template(looked: Looked) -> Iterator[Finding]:
    survey = looked.survey
    if not looked.marked:
        yield Finding(
            rule="no generation markers",
            level=NOTE,
            found="the chat template has no {% generation %} markers: answers were found by comparing renderings",
            todo="look at the mask of a conversation (above, or --show 3)",
        )
    if reasoning := survey.counts[Survey.REASONING]:
        yield Finding(
            rule="reasoning left out",
            level=WARNING,
            found=f"{reasoning} conversations keep reasoning in a field of its own, which is not read",
            examples=tuple(survey.examples[Survey.REASONING]),
            todo="put it before the answer in content, as <think>...</think>, or regenerate",
        )
    if looked.thinks is None or looked.waiting is not None:
        return
    other = 1 - looked.thinking_share if looked.thinks else looked.thinking_share
    if other > FEW:
        does, have = ("asks for", "have no") if looked.thinks else ("does without", "have a")
        yield Finding(
            rule="thinking flag",
            level=WARNING,
            found=f"the chat template {does} reasoning by default, and {other:.0%} of the conversations {have} <think> "
            "block: a server at its defaults shows the draft what it was not trained on",
            examples=() if looked.thinks else tuple(survey.examples[Survey.THINKING]),
            todo=f"regenerate the answers, or serve with enable_thinking={'false' if looked.thinks else 'true'}",
        )


def _vocabulary(looked: Looked) -> Iterator[Finding]:
    vocabulary = looked.vocabulary
    if vocabulary is None:
        return
    if vocabulary.missing:
        told = ", ".join(f"{token} ({count})" for token, count in vocabulary.missing.items())
        yield Finding(
            rule="special tokens",
            level=WARNING,
            found=f"supervised, and not in the draft vocabulary: {told}: each ends a round",
            todo="raise algorithm.draft_vocab_size",
        )
    if vocabulary.unseen < LEAST_COVERAGE:
        k, most = max(vocabulary.most.items())
        yield Finding(
            rule="coverage",
            level=WARNING,
            found=f"about {1 - vocabulary.unseen:.1%} of new text cannot be drafted: without any other error tau would "
            f"end at about {most:.2f} for K = {k}, not {k + 1}",
            # A vocabulary that has all that was seen is filled up with tokens that nobody chose.
            todo="raise algorithm.draft_vocab_size"
            if vocabulary.coverage < 1
            else "train on more conversations: the vocabulary has every token that occurs in these",
        )
    if never := [token for token, count in vocabulary.ends.items() if not count]:
        found = f"{', '.join(never)} ends a text for the verifier, and no conversation here"
        yield Finding(rule="ends of text", level=NOTE, found=found)


def _policy(looked: Looked) -> Iterator[Finding]:
    policy = looked.on_policy
    if looked.waiting is not None:
        yield Finding(
            rule="answers",
            level=NOTE,
            found=f"the verifier has not answered the {looked.waiting} prompts yet: only these can be looked at",
            todo="spec run generates the answers first (it says how long that takes); then look again",
        )
    if policy is None:
        return
    if policy.verdict == "foreign":
        yield Finding(
            rule="off-policy",
            level=WARNING,
            found=policy.words,
            todo="[data.regenerate] lets the verifier write the answers, spec regenerate does so once",
        )
    if policy.ends_agreement is not None and policy.ends_agreement < LEAST_ENDS and policy.verdict != "foreign":
        yield Finding(
            rule="answers cut short",
            level=WARNING,
            found=f"at {1 - policy.ends_agreement:.0%} of the {policy.ends} ends of turns the verifier would go on: "
            "the draft learns to stop where nobody stops",
            todo="raise max_new_tokens of the regeneration",
        )


def policy_verdict(*, agreement: float, excess: float) -> tuple[str, str]:
    """Returns "greedy", "sampled" or "foreign", and the consequence in words.

    Args:
        agreement: share of the supervised places at which the verifier's greedy token is the data's.
        excess: by how many nats a token surprises the verifier more than its own samples would.
    """
    missed = f"{1 - agreement:.0%}"
    if agreement >= GREEDY_AGREEMENT:
        return "greedy", "the verifier's own greedy answers: the draft is trained on what it will be asked to draft"
    if excess <= FOREIGN_EXCESS:
        return "sampled", (
            "what the verifier itself could have sampled: the draft is trained on what it will be asked to draft; "
            f"at temperature 0 the verifier would say something else at {missed} of the places"
        )
    return "foreign", (
        f"not the verifier's own text: it would say something else at {missed} of the places, and a token surprises it "
        f"by {excess:.2f} nats more than its own would; the draft learns tokens that the verifier does not say, and "
        "tau over the verifier's own answers will be lower than the training's accuracy promises"
    )
