"""Benchmark prompts in the training data are found, word for word and nearly."""

from __future__ import annotations

from data_toys import row

from speculators.data.conversations import parse
from speculators.data.leakage import Guard, HeldOut, five_grams, overlap
from speculators.inspection.kinds import REASONING
from speculators.inspection.survey import RawRow, Survey, rows_of, survey_rows

LONG = "Explain in three short sentences why the sky over the sea is blue in the morning and red in the evening."
HELD = [HeldOut("suite", "one", LONG), HeldOut("suite", "two", "Why?")]


def rows(*raws):
    return [RawRow(f"f.jsonl:{n}", "f.jsonl", raw, parse(raw, f"f:{n}")) for n, raw in enumerate(raws, start=1)]


def test_nearest_is_the_largest_overlap_with_any_held_out_prompt():
    """One look-up per 5-gram gives the same result as a comparison with every held-out prompt."""
    texts = [LONG, LONG.replace("morning", "winter"), LONG.split(" why ")[0], "why", "something else entirely, friend"]
    guard = Guard(HELD)
    for text in texts:
        want = max(overlap(five_grams(held.prompt), five_grams(text)) for held in HELD)
        assert guard.nearest(text)[0] == want
    assert guard.nearest(texts[1])[1] == HELD[0]
    assert guard.nearest(texts[4]) == (0.0, None)


def test_same_and_near_prompts_are_distinguished_with_their_places():
    """Case and spacing keep a prompt the same; a changed word makes it near; near prompts do not count as same."""
    found = survey_rows(
        rows(row(LONG.upper() + " ", "a"), row(LONG.replace("morning", "winter"), "b"), row("x", "c")), HELD
    )
    assert (found.counts[Survey.SAME], found.counts[Survey.NEAR], found.usable) == (1, 1, 3)
    assert found.examples[Survey.SAME] == ["f.jsonl:1 f:1 is suite's one"]
    assert found.examples[Survey.NEAR][0].startswith("f.jsonl:2 f:2 has ")
    assert 0.6 < found.suites["suite"].largest < 1


def test_every_suite_has_its_own_overlap():
    """A prompt that two suites share, or come near to, counts for both of them, and once among the rows."""
    held = [*HELD, HeldOut("copy", "c", LONG), HeldOut("other", "o", "What is the capital of the land of the sea?")]
    found = survey_rows(rows(row(LONG, "a"), row(LONG.replace("morning", "winter"), "b"), row("x", "c")), held)
    assert {name: (o.prompts, o.same, o.near) for name, o in found.suites.items()} == {
        "suite": (2, 1, 1),
        "copy": (1, 1, 1),
        "other": (1, 0, 0),
    }
    assert (found.counts[Survey.SAME], found.counts[Survey.NEAR]) == (1, 1)


def test_rows_that_cannot_be_used_are_counted_by_reason_with_file_and_line():
    """The first few rows of each reason are kept as examples."""
    found = survey_rows(rows(*[{"messages": [{"role": "user", "content": "q"}]}] * 5, row("q", "a"), {"x": 1}), [])
    assert dict(found.reasons) == {"no assistant turn": 5, "no messages": 1}
    assert found.examples["no assistant turn"] == ["f.jsonl:1", "f.jsonl:2", "f.jsonl:3"]
    assert found.rows == {"f.jsonl": 7}


def test_repeats_reasoning_and_thinking_are_counted():
    """The survey counts repeated prompts, and reasoning wherever it stands."""
    apart = row("q", "a")
    apart["messages"][1]["reasoning_content"] = "because"
    found = survey_rows(rows(row("q", "<think>so</think>a"), apart), [])
    assert (found.counts[Survey.REPEATED], found.counts[REASONING]) == (1, 2)


def test_rows_are_looked_up_by_id_and_no_further_than_needed():
    """A conversation that `prepare` names by its id is located by file and line, without reading what follows it."""
    raws = iter(rows(row("q", "a", id="one"), row("r", "a", id="two"), row("s", "a", id="three")))
    ((place, conversation),) = rows_of(raws, ["two"]).values()
    assert (place, conversation.prompt) == ("f.jsonl:2", "r")
    assert [each.conversation.id for each in raws] == ["three"]
    assert rows_of(rows(row("q", "a", id="one")), ["never"]) == {}
