"""Each rule gives its level, an example if there is one, and advice."""

from __future__ import annotations

import attrs
import pytest
from data_toys import row

from speculators.data.conversations import parse
from speculators.data.leakage import HeldOut
from speculators.data.template import ALL_SUPERVISED, ChatTemplate
from speculators.inspection.lint import lint, policy_verdict
from speculators.inspection.survey import RawRow, Survey, survey_rows
from speculators.inspection.view import Bin, DataFinding, DataView, Leakage, OnPolicy, Rows, Vocabulary

ROWS = Rows(
    folder="there",
    read=100,
    conversations=100,
    tokens=1000,
    supervised=400,
    max_tokens=64,
    truncated=0,
    skipped={},
    quartiles=(1, 2, 3, 4, 5),
    histogram=(Bin(1, 5, 100),),
)
VOCABULARY = Vocabulary(
    size=8, of=64, coverage=1.0, unseen=0.99, ends={"<end>": 100}, missing={}, most={1: 1.99, 5: 5.8}
)
POLICY = OnPolicy(
    dtype="float32",
    tokens=1000,
    log_probability=-0.5,
    perplexity=1.6,
    entropy=0.5,
    agreement=0.99,
    ends=10,
    ends_agreement=1.0,
    verdict="greedy",
    consequence="",
    conversations=(),
)


def raw(*values):
    return [RawRow(f"f.jsonl:{n}", "f.jsonl", value, parse(value, f"f:{n}")) for n, value in enumerate(values, start=1)]


def surveyed(*values, held_out=()) -> Survey:
    return survey_rows(raw(*(values or [row(f"question {k}", "answer") for k in range(100)])), held_out)


def measured(survey: Survey, **changes) -> DataView:
    """Data without any finding, with changes."""
    kinds = survey.counts
    fine = DataView(
        recipe="r",
        sources={"f.jsonl": 100},
        leakage=Leakage(suites={}, same=kinds["same"], near=kinds["near"], limit=0.6),
        rows=ROWS,
        vocabulary=VOCABULARY,
        on_policy=POLICY,
        waiting=None,
        marked=True,
        thinks=None,
        thinking_share=0.0,
    )
    return attrs.evolve(fine, **changes)


def linted(*values, refusal="", skipped_examples=(), takes=(), **changes) -> tuple[DataFinding, ...]:
    """Findings of data that has none but for the changes."""
    survey = surveyed(*values)
    return lint(
        measured(survey, **changes),
        survey,
        refusal=refusal,
        skipped_examples=dict(skipped_examples),
        takes=dict(takes),
    )


def levels(findings: tuple[DataFinding, ...]) -> dict[str, str]:
    return {finding.rule: finding.level for finding in findings}


def test_good_data_has_no_finding():
    """Good data gives no finding."""
    assert linted() == ()


def test_a_leaked_prompt_is_an_error_with_its_place():
    """It comes first, whatever other findings there are."""
    survey = surveyed(row("What?", "a"), row("Else", "a"), held_out=[HeldOut("s", "h1", "what?")])
    findings = lint(measured(survey, marked=False), survey)
    assert [(finding.rule, finding.level) for finding in findings] == [
        ("leakage", "error"),
        ("no generation markers", "note"),
    ]
    assert findings[0].examples == ("f.jsonl:1 f:1 is s's h1",)
    assert findings[0].todo


def test_the_level_of_rows_without_an_answer_depends_on_their_share():
    """A few are a note, more than 1% a warning, more than half an error if nothing is prepared; a line is given."""
    bad = {"messages": [{"role": "user", "content": "x"}]}
    for count, level in ((1, "note"), (2, "warning"), (60, "warning")):
        survey = surveyed(*[bad] * count, *[row(f"q{k}", "a") for k in range(100 - count)])
        reason = next(iter(survey.reasons))
        rows = None if count > 50 else attrs.evolve(ROWS, skipped=dict(survey.reasons))
        every = lint(measured(survey, rows=rows), survey)
        findings = [f for f in every if reason in f.message]
        assert [(f.level, f.examples[0]) for f in findings] == [(level, "f.jsonl:1")]
        assert "add answers" in findings[0].todo
        errors = [f for f in every if f.level == "error"]
        assert len(errors) == (count > 50)


def test_an_all_ones_mask_names_a_row_and_the_remedy():
    """Rows that the template cannot encode have an example, too, located by the conversation's id."""
    skipped = attrs.evolve(ROWS, skipped={ALL_SUPERVISED: 40})
    (finding,) = linted(rows=skipped, skipped_examples={ALL_SUPERVISED: "f.jsonl:7 seven"})
    assert (finding.level, finding.examples) == ("warning", ("f.jsonl:7 seven",))
    assert "generation %} markers" in finding.todo


def test_data_that_prepare_refuses_is_an_error_with_its_message():
    """The finding takes the error's message, and its hint as advice."""
    (finding,) = linted(rows=None, vocabulary=None, on_policy=None, refusal="no such thing\nmake one")
    assert (finding.level, finding.message, finding.todo) == ("error", "no such thing", "make one")


@pytest.mark.parametrize(
    ("thinks", "share", "words"),
    [
        (True, 0.0, "have no reasoning"),
        (True, 0.5, "50% of the conversations have no"),
        (False, 1.0, "have reasoning"),
        (True, 1.0, None),
        (False, 0.0, None),
        (None, 0.5, None),
    ],
)
def test_thinking_flag_and_data_must_agree(thinks, share, words):
    """A warning appears unless the answers are like those that a server's default asks for."""
    findings = linted(thinks=thinks, thinking_share=share)
    assert bool(findings) == (words is not None)
    assert all(words in finding.message and finding.level == "warning" for finding in findings)


@pytest.mark.parametrize(
    ("changes", "rule", "level"),
    [
        ({"marked": False}, "no generation markers", "note"),
        ({"rows": attrs.evolve(ROWS, truncated=20)}, "truncated", "warning"),
        ({"vocabulary": attrs.evolve(VOCABULARY, missing={"<tool>": 3})}, "special tokens", "warning"),
        ({"vocabulary": attrs.evolve(VOCABULARY, unseen=0.9)}, "coverage", "warning"),
        ({"vocabulary": attrs.evolve(VOCABULARY, ends={"<end>": 100, "<eot>": 0})}, "ends of text", "note"),
        ({"on_policy": attrs.evolve(POLICY, verdict="foreign", consequence="w")}, "off-policy", "warning"),
        ({"on_policy": attrs.evolve(POLICY, ends_agreement=0.5)}, "answers cut short", "warning"),
        ({"takes": {"f.jsonl": 100}}, "take", "note"),
        ({"waiting": 5, "rows": None, "vocabulary": None, "on_policy": None}, "answers", "note"),
    ],
)
def test_each_rule_has_its_level(changes, rule, level):
    """One fault gives exactly one finding, with the level of its rule."""
    assert levels(linted(**changes)) == {rule: level}


OWN = {"token_ids": [{"turn": 1, "prompt": [1], "answer": [2]}]}


def own_rows(count=100):
    return [row(f"question {k}", "answer", **OWN) for k in range(count)]


def test_advice_is_never_to_do_again_what_was_done():
    """Answers that a verifier wrote are not written again for nothing; each case gets what may help it."""
    foreign = {"on_policy": attrs.evolve(POLICY, verdict="foreign", consequence="w")}
    todo = {
        "as it is": linted(**foreign)[0].todo,
        "text kept": linted(answers="there/answers.jsonl", **foreign)[0].todo,
        "ids kept": linted(*own_rows(), kinds={"token ids": 100}, answers="there/answers.jsonl", **foreign)[0].todo,
    }
    assert "[data.regenerate]" in todo["as it is"]
    assert "remove there/answers.jsonl" in todo["text kept"]
    assert "who wrote" in todo["ids kept"]
    assert not any("regenerate" in todo[kind] for kind in ("text kept", "ids kept"))
    (flag,) = linted(thinks=True, thinking_share=0.0, answers="there/answers.jsonl")
    assert "enable_thinking = false" in flag.todo
    assert "regenerate" not in flag.todo
    # The verifier wrote them on the very prompts that a server sends.
    assert linted(*own_rows(), kinds={"token ids": 100}, thinks=True, thinking_share=0.0) == ()


def test_what_a_template_drops_is_reported_with_its_consequence():
    """Earlier reasoning is dropped in serving, too; whatever else is dropped, the draft is trained without."""
    dropped = linted(dropped=("tools", "reasoning of earlier turns"))
    assert [(finding.level, finding.rule) for finding in dropped] == [
        ("warning", "dropped by the template"),
        ("note", "dropped by the template"),
    ]
    assert "does not show tools" in dropped[0].message
    assert "verifier.chat_template" in dropped[0].todo


def test_a_take_that_took_everything_is_not_mentioned():
    """Only a limit that was reached can have left rows out."""
    assert levels(linted(takes={"f.jsonl": 101})) == {}


def test_verdict_goes_by_agreement_then_by_surprise():
    """Greedy answers agree; samples disagree as often as the verifier is unsure; more surprising text is foreign."""
    assert policy_verdict(agreement=0.99, excess=-0.4)[0] == "greedy"
    assert policy_verdict(agreement=0.7, excess=0.02)[0] == "sampled"
    verdict, consequence = policy_verdict(agreement=0.6, excess=0.8)
    assert verdict == "foreign"
    assert "40% of the places" in consequence
    assert "0.80 nats" in consequence


@pytest.mark.parametrize(
    ("template", "default"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}", True),
        ("{% if thinking is defined and thinking %}<think>{% endif %}", False),
        ("{% set enable_thinking = false %}\n{% if enable_thinking %}<think>{% endif %}", False),
        ("{{ raise_exception('no system prompt') }}", None),
    ],
)
def test_what_a_prompt_asks_for_by_default_is_tried_out(tokenizer, template, default):
    """A template without the switch renders the same text for every setting."""
    tokenizer.chat_template = template
    assert ChatTemplate.of(tokenizer).thinks_by_default() is default
