"""The prompts of the shipped recipes: counts, splits, variety, and no leak of benchmark prompts into training."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from speculators.bench.suites import load_suite
from speculators.data.leakage import Guard, HeldOut
from speculators.recipe.schema import Suite
from speculators.recipes.data import make_prompts
from speculators.recipes.data.make_prompts import CATEGORIES, Writer, make, prompts_of

SETS = ("quickstart", "smollm2")


@pytest.fixture(scope="module", params=SETS)
def rows(request):
    return make(request.param)


@pytest.fixture(scope="module")
def quickstart():
    return make("quickstart")


@pytest.fixture(scope="module")
def smollm2():
    return make("smollm2")


@pytest.fixture(scope="module")
def untemplated():
    return load_suite(Suite(name="untemplated"))


def prompt(row):
    return row["messages"][0]["content"]


def prompts(rows, split):
    return [prompt(row) for row in rows if row["split"] == split]


def test_quickstart_has_83_prompts_of_each_category_and_8_of_them_held_out(quickstart):
    """Quickstart has 664 rows, 83 in each category, and holds out eight of them: a tenth."""
    counts = Counter((row["category"], row["split"]) for row in quickstart)
    assert counts == {(name, split): count for name in CATEGORIES for split, count in (("train", 75), ("test", 8))}


def test_the_held_out_tenth_is_of_the_same_kind_as_the_rest(quickstart):
    """Hand-written prompts are as frequent among the held-out ones as among the others, up to chance."""
    tests = [row for row in quickstart if row["split"] == "test"]
    written = sum(not row["template"] for row in tests) / len(tests)
    overall = sum(not row["template"] for row in quickstart) / len(quickstart)
    assert abs(written - overall) <= 3 * (overall * (1 - overall) / len(tests)) ** 0.5


def test_smollm2_extends_the_training_prompts_of_quickstart(quickstart, smollm2):
    """SmolLM2 has 4400 training rows, 550 in each category, including those of quickstart under the same ids."""
    assert Counter((row["category"], row["split"]) for row in smollm2) == {(name, "train"): 550 for name in CATEGORIES}
    large = {row["id"]: prompt(row) for row in smollm2}
    small = {row["id"]: prompt(row) for row in quickstart if row["split"] == "train"}
    assert small.items() <= large.items()


def test_no_prompt_and_no_id_occurs_twice(rows):
    """Every prompt and every id of a set is unique, also without regard to case and spaces."""
    assert len({" ".join(prompt(row).lower().split()) for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_no_template_makes_more_than_one_percent_of_a_set(rows):
    """Each category has at least twelve templates, and none makes more than 1% of the rows."""
    shares = Counter((row["category"], row["template"]) for row in rows if row["template"])
    assert max(shares.values()) <= 0.01 * len(rows)
    assert min(Counter(category for category, _ in shares).values()) >= 12


def test_each_category_has_at_least_15_hand_written_prompts(quickstart):
    """Quickstart holds 15 or more hand-written prompts of each category."""
    assert min(Counter(row["category"] for row in quickstart if not row["template"]).values()) >= 15


@pytest.mark.parametrize("name", SETS)
def test_held_out_prompts_are_not_near_duplicates_of_training_prompts(name, quickstart):
    """No training prompt shares more than 60% of the distinct word 5-grams of a held-out one."""
    train, tests = prompts(make(name), "train"), prompts(quickstart, "test")
    assert not set(tests) & set(train)
    guard = Guard(HeldOut("quickstart", str(place), text) for place, text in enumerate(tests))
    assert max(guard.nearest(text)[0] for text in train) <= 0.6


def test_the_untemplated_suite_has_20_prompts_of_each_category(untemplated):
    """The categories take turns, so that the first N prompts are balanced; each prompt is one turn."""
    assert [each.category for each in untemplated] == [*CATEGORIES] * 20
    assert all(len(each.messages) == 1 and not each.later for each in untemplated)


def test_the_untemplated_suite_shares_no_more_than_stock_phrases_with_training(untemplated, quickstart, smollm2):
    """No prompt of quickstart or smollm2 has more than 5% of the distinct word 5-grams of one of the suite's.

    The maximum is 4.8%, one of 21: "in three or four sentences".
    """
    guard = Guard(HeldOut("untemplated", each.id, each.messages[0].content) for each in untemplated)
    assert max(guard.nearest(prompt(row))[0] for row in [*quickstart, *smollm2]) <= 0.05


def test_the_untemplated_suite_shares_no_run_of_7_words_with_what_training_prompts_are_made_of(untemplated):
    """Checks the fixed text of templates, hand-written prompts and slot values, including those no set uses."""
    known = set()
    for category in CATEGORIES:
        written, templates, slots = make_prompts.read_parts(category)
        for text in [*written, *templates, *(value for values in slots.values() for value in values)]:
            for fixed in re.split(r"\{[^}]*\}", text):
                known |= runs_of_7_words(fixed)
    assert len(known) > 1000
    assert [each.id for each in untemplated if runs_of_7_words(each.messages[0].content) & known] == []


def runs_of_7_words(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 7]) for start in range(len(words) - 6)}


def test_most_prompts_have_10_to_80_words(rows):
    """At least 95% of the prompts have 10 to 80 words, and none over 110."""
    lengths = [len(prompt(row).split()) for row in rows]
    assert sum(10 <= length <= 80 for length in lengths) >= 0.95 * len(lengths)
    assert max(lengths) <= 110


def test_no_slot_is_left_in_a_prompt(rows):
    """Every slot and every expression is filled."""
    left = [prompt(row) for row in rows if make_prompts.SLOT.search(prompt(row)) or "{=" in prompt(row)]
    assert left == []


def test_every_list_of_values_is_used():
    """Each list of a category's own file is named by a slot, and each slot names a list."""
    for category in CATEGORIES:
        _, templates, slots = make_prompts.read_parts(category)
        path = Path(make_prompts.__file__).with_name(f"parts_{category}.json")
        own = json.loads(path.read_text(encoding="utf-8"))["slots"]
        texts = templates + [value for values in own.values() for value in values]
        used = {match["name"] for text in texts for match in make_prompts.SLOT.finditer(text) if match["name"]}
        assert set(own) <= used <= set(slots), category


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(quickstart):
    """The rows are a function of the seed."""
    assert make("quickstart") == quickstart
    assert prompts(make("quickstart", seed=1), "train") != prompts(quickstart, "train")


def test_the_shipped_smollm2_prompts_are_the_generated_ones(smollm2):
    """The script writes exactly recipes/data/smollm2_prompts.jsonl."""
    path = Path(make_prompts.__file__).with_name("smollm2_prompts.jsonl")
    shipped = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert shipped == [{key: row[key] for key in row if key != "template"} for row in smollm2]


def test_the_prompts_of_the_shipped_quickstart_are_the_generated_ones(quickstart):
    """recipes/data/quickstart.jsonl has the prompts that the script writes, each with one answer of the verifier."""
    path = Path(make_prompts.__file__).with_name("quickstart.jsonl")
    shipped = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in shipped)
    asked = [{**row, "messages": row["messages"][:1]} for row in shipped]
    assert asked == [{key: row[key] for key in row if key != "template"} for row in quickstart]


def test_quickstart_more_are_the_next_1800_prompts_of_smollm2_with_the_verifiers_answers():
    """Rows 601 to 2400 of smollm2_prompts.jsonl: quickstart's own 600 training prompts come before them."""
    folder = Path(make_prompts.__file__).parent
    prompts, more = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("smollm2_prompts.jsonl", "quickstart_more.jsonl")
    )
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in more)
    assert [{**row, "messages": row["messages"][:1]} for row in more] == prompts[600:2400]


@pytest.mark.parametrize("name", ["quickstart.jsonl", "quickstart_more.jsonl"])
def test_the_provenance_of_shipped_answers_is_of_these_very_files(name):
    """The sha256 and the number of conversations are the file's; greedy, so that anybody can make it again."""
    content = Path(make_prompts.__file__).with_name(name).read_bytes()
    facts = json.loads(Path(make_prompts.__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["conversations"] == content.count(b"\n")
    assert facts["sampling"]["temperature"] == 0.0


def test_a_template_is_filled_with_consistent_values():
    """A slot that occurs twice has one value, numbered slots differ, numbers and expressions agree, articles fit."""
    writer = Writer({"city": ["Oslo", "Lima"], "beast": ["owl"]}, rng=random.Random(0))
    text = writer.fill("{city} {city} {city2} {a:10..30/5} {=a*3} {=a+a} a {beast}").split()
    assert text[0] == text[1] != text[2]
    number = int(text[3])
    assert number in range(10, 31, 5)
    assert text[4:] == [str(3 * number), str(2 * number), "an", "owl"]


def test_a_beginning_consists_of_whole_sentences_and_enough_words():
    """`{passage~}` gives the first sentences of a passage, 45 words or more."""
    passage = " ".join(f"Sentence number {i} has exactly eight words here." for i in range(10))
    writer = Writer({"passage": [passage]}, rng=random.Random(0))
    for _ in range(20):
        text = writer.fill("{passage~}")
        assert passage.startswith(text)
        assert text.endswith("here.")
        assert len(text.split()) >= 45


def test_an_exhausted_category_says_so(monkeypatch):
    """Templates that cannot give another prompt raise an error instead of an endless loop."""
    monkeypatch.setattr(
        make_prompts, "read_parts", lambda category: (["Hello."], ["Say {word}."], {"word": ["a", "b"]})
    )
    stream = prompts_of("chat", seed=0)
    assert {text for text, _ in (next(stream), next(stream), next(stream))} == {"Hello.", "Say a.", "Say b."}
    with pytest.raises(RuntimeError, match="no more than 3 different prompts"):
        next(stream)


def test_the_command_writes_json_lines_to_the_file_or_to_standard_output(tmp_path, capsys):
    """`--out` names the file; without it the same text goes to standard output; rows have exactly four keys."""
    path = tmp_path / "prompts.jsonl"
    make_prompts.main(["quickstart", "--out", str(path)])
    assert capsys.readouterr().out == ""
    make_prompts.main(["quickstart"])
    assert capsys.readouterr().out == path.read_text(encoding="utf-8")
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["id", "category", "split", "messages"]
