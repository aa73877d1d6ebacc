"""Turns what `spec data` measured into findings, each with its level, an example and advice.

An "error" means that the run would be refused or its number could not be trusted; a "warning" costs acceptance
length; a "note" is something to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from speculators.data.prepare import REMEDIES
from speculators.inspection.kinds import EARLIER_REASONING, IDS, REASONING
from speculators.inspection.survey import Survey, short_path
from speculators.inspection.view import ERROR, NOTE, WARNING, DataFinding, DataView

# Shares of all rows: a reason that costs more than FEW is a warning; if all reasons together cost more than MOST, the
# run is not the recipe's.
FEW, MOST = 0.01, 0.5
# With 93% of the tokens, a draft without any other error loses one token of acceptance length at K = 5.
LEAST_COVERAGE = 0.93
# Share of the rows. A row that is cut loses its end, and with it the tokens that end a turn.
MANY_TRUNCATED = 0.1
# Greedy answers agree, apart from rounding (another dtype, another batch) and from answers cut short.
GREEDY_AGREEMENT = 0.95
# In nats per token. The verifier's own samples surprise it by its entropy; a larger surprise means another author.
# Over a thousand tokens, chance moves the difference by about 0.03.
FOREIGN_EXCESS = 0.1
# Share of the turns' ends. Where the length limit cut an answer, the verifier would have gone on.
LEAST_ENDS = 0.8


def lint(
    view: DataView,
    survey: Survey,
    *,
    refusal: str = "",
    skipped_examples: Mapping[str, str] | None = None,
    takes: Mapping[str, int] | None = None,
) -> tuple[DataFinding, ...]:
    """Applies all rules; the gravest finding comes first.

    Args:
        view: the measurements; its `findings` are ignored.
        survey: the rows as they were written.
        refusal: why the stage `prepare` refused the data; "" where it did not, or was not run.
        skipped_examples: a conversation that the chat template could not encode, by reason.
        takes: by source, the number of rows that the recipe limits it to.
    """
    findings = [
        *_leaks(view, survey),
        *_rows(view, survey, refusal, skipped_examples or {}, takes or {}),
        *_template(view, survey),
        *_vocabulary(view),
        *_policy(view, survey),
    ]
    return tuple(sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level)))


def _leaks(view: DataView, survey: Survey) -> Iterator[DataFinding]:
    leakage = view.leakage
    if leakage.same:
        yield DataFinding(
            rule="leakage",
            level=ERROR,
            message=f"{leakage.same} training prompts are prompts of the benchmark: spec run refuses them",
            examples=tuple(survey.examples[Survey.SAME]),
            todo="remove them from the sources, or benchmark on another suite",
        )
    if leakage.near:
        yield DataFinding(
            rule="near-duplicates",
            level=WARNING,
            message=f"{leakage.near} training prompts share over {leakage.limit:.0%} of a benchmark prompt's 5-grams",
            examples=tuple(survey.examples[Survey.NEAR]),
            todo="read them, and remove those that ask the same question",
        )
    if repeated := survey.counts[Survey.REPEATED]:
        yield DataFinding(
            rule="repeated prompts",
            level=NOTE,
            message=f"{repeated} conversations begin with the prompt of an earlier one, which counts several times",
            examples=tuple(survey.examples[Survey.REPEATED]),
            todo="drop them, unless they are several samples of the answer",
        )


def _rows(
    view: DataView, survey: Survey, refusal: str, skipped_examples: Mapping[str, str], takes: Mapping[str, int]
) -> Iterator[DataFinding]:
    rows = view.rows
    reasons, read = rows.skipped if rows else survey.reasons, survey.rows.total()
    if refusal:
        message, _, hint = refusal.partition("\n")
        yield DataFinding(rule="nothing to train on", level=ERROR, message=message, todo=hint)
    if rows is None and not refusal and sum(reasons.values()) > MOST * read:
        yield DataFinding(
            rule="rows left out",
            level=ERROR,
            message=f"{sum(reasons.values())} of {read} rows are left out: the data is not what the recipe says",
            todo="see the reasons",
        )
    for reason, count in reasons.items():
        yield DataFinding(
            rule="rows left out",
            level=WARNING if count > FEW * read else NOTE,
            message=f"{count} of {read} rows are left out: {reason}",
            examples=(skipped_examples[reason],) if reason in skipped_examples else tuple(survey.examples[reason]),
            todo=REMEDIES.get(reason, ""),
        )
    for source, take in takes.items():
        if survey.rows[source] == take:
            message = f"{short_path(source)}: the recipe takes only the first {take} rows"
            yield DataFinding(rule="take", level=NOTE, message=message)
    if rows and rows.truncated > MANY_TRUNCATED * rows.conversations:
        yield DataFinding(
            rule="truncated",
            level=WARNING,
            message=f"{rows.truncated} of {rows.conversations} conversations are cut at {rows.max_tokens} tokens",
            todo="raise data.max_tokens: otherwise the draft learns neither ends of turns nor long contexts",
        )


def _template(view: DataView, survey: Survey) -> Iterator[DataFinding]:
    if not view.marked:
        yield DataFinding(
            rule="no generation markers",
            level=NOTE,
            message="the chat template has no {% generation %} markers: the mask comes from comparing renderings",
            todo="check the mask of a conversation (above, or --show 3)",
        )
    # What a verifier wrote is trained on as it is.
    for kind in () if _own_ids(view, survey) else view.dropped:
        served = kind == EARLIER_REASONING
        yield DataFinding(
            rule="dropped by the template",
            level=NOTE if served else WARNING,
            message=f"the chat template does not show {kind}, which {survey.counts[kind]} conversations have"
            + (": servers do not show it either" if served else ": the draft is trained without it"),
            examples=() if served else tuple(survey.examples[kind]),
            todo="" if served else "name a template that shows it: verifier.chat_template",
        )
    yield from _thinking(view, survey)


def _thinking(view: DataView, survey: Survey) -> Iterator[DataFinding]:
    """Compares the data's reasoning with the template's default, unless the verifier itself wrote it on its prompts."""
    if view.thinks is None or view.waiting is not None or _own_ids(view, survey):
        return
    other = 1 - view.thinking_share if view.thinks else view.thinking_share
    if other > FEW:
        does, have = ("asks for", "have no") if view.thinks else ("does not ask for", "have")
        switch = f"{{ enable_thinking = {'false' if view.thinks else 'true'} }}"
        yield DataFinding(
            rule="thinking flag",
            level=WARNING,
            message=f"the chat template {does} reasoning by default, and {other:.0%} of the conversations {have} "
            "reasoning: a server at its defaults shows the draft text that it was not trained on",
            examples=() if view.thinks else tuple(survey.examples[REASONING]),
            todo=f"ask alike in training and serving: verifier.template = {switch}"
            + ("" if view.answers else ", or regenerate the answers"),
        )


def _own_ids(view: DataView, survey: Survey) -> bool:
    """Whether every conversation has the ids that a verifier wrote."""
    return bool(survey.usable) and view.kinds.get(IDS) == survey.usable


def _vocabulary(view: DataView) -> Iterator[DataFinding]:
    vocabulary = view.vocabulary
    if vocabulary is None:
        return
    if vocabulary.missing:
        tokens = ", ".join(f"{token} ({count})" for token, count in vocabulary.missing.items())
        yield DataFinding(
            rule="special tokens",
            level=WARNING,
            message=f"supervised, but not in the draft vocabulary: {tokens}: each ends a round",
            todo="raise algorithm.draft_vocab_size",
        )
    if vocabulary.unseen < LEAST_COVERAGE:
        k, most = max(vocabulary.most.items())
        yield DataFinding(
            rule="coverage",
            level=WARNING,
            message=f"about {1 - vocabulary.unseen:.1%} of new text cannot be drafted: without any other error, tau "
            f"would reach about {most:.2f} for K = {k}, not {k + 1}",
            # A vocabulary that covers everything it saw is filled up with arbitrary tokens: a larger one helps little.
            todo="raise algorithm.draft_vocab_size"
            if vocabulary.coverage < 1
            else "train on more conversations: the vocabulary already has every token of these",
        )
    if never := [token for token, count in vocabulary.ends.items() if not count]:
        message = f"{', '.join(never)} ends a text for the verifier, but no conversation here"
        yield DataFinding(rule="ends of text", level=NOTE, message=message)


def _policy(view: DataView, survey: Survey) -> Iterator[DataFinding]:
    policy = view.on_policy
    if view.waiting is not None:
        yield DataFinding(
            rule="answers",
            level=NOTE,
            message=f"the verifier has not answered the {view.waiting} prompts yet: only the prompts can be shown",
            todo="spec run generates the answers first (it says how long that takes); then run spec data again",
        )
    if policy is None:
        return
    if policy.verdict == "foreign":
        yield DataFinding(
            rule="off-policy",
            level=WARNING,
            message=policy.consequence,
            todo=_off_policy_remedy(view, survey),
        )
    if policy.ends_agreement is not None and policy.ends_agreement < LEAST_ENDS and policy.verdict != "foreign":
        yield DataFinding(
            rule="answers cut short",
            level=WARNING,
            message=f"at {1 - policy.ends_agreement:.0%} of the {policy.ends} ends of turns the verifier would go on: "
            "the draft learns to stop where the verifier does not",
            todo="raise max_new_tokens of the regeneration",
        )


def _off_policy_remedy(view: DataView, survey: Survey) -> str:
    """Advises what has not been done yet: answers that were generated are not generated again for nothing."""
    if _own_ids(view, survey):
        return (
            "find out who wrote the answers, whose token ids are kept: another verifier, precision or temperature? "
            "The file beside them (.json) says so; compare it with [verifier]"
        )
    if view.answers:
        return (
            "the chat template rewrites these answers, which an earlier version kept as text alone: remove "
            f"{view.answers}, and spec run has them made with their token ids"
        )
    return "let the verifier write the answers: [data.regenerate] in the recipe, or spec regenerate once"


def policy_verdict(*, agreement: float, excess: float) -> tuple[str, str]:
    """Decides whether text is "greedy", "sampled" or "foreign" to the verifier, and says what follows.

    Args:
        agreement: share of the supervised places at which the verifier's greedy token is the data's.
        excess: by how many nats per token the data surprises the verifier more than its own samples would.
    """
    missed = f"{1 - agreement:.0%}"
    if agreement >= GREEDY_AGREEMENT:
        return "greedy", "the verifier's own greedy answers: the draft is trained on what it will be asked to draft"
    if excess <= FOREIGN_EXCESS:
        return "sampled", (
            "text that the verifier itself could have sampled: the draft is trained on what it will be asked to draft; "
            f"at temperature 0 the verifier would say something else at {missed} of the places"
        )
    return "foreign", (
        f"not the verifier's own text: it would say something else at {missed} of the places, and a token surprises it "
        f"by {excess:.2f} nats more than one of its own; the draft learns tokens that the verifier does not say, and "
        "tau on the verifier's own answers will be lower than the training accuracy suggests"
    )
