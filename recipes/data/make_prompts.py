"""Writes the prompts of the shipped recipes as JSON lines, always the same, from the `parts_*.json` files beside it.

Each category has hand-written prompts, templates, and lists of values for the slots of its templates. In a template:

    {city}         a value of the list `city` (values may contain slots, too)
    {city2}        another value of it
    {passage~}     the first sentences of a value
    {a:3..60/5}    a number from 3 to 60, in steps of 5
    {=a*3} {=a+b}  a product or a sum of numbers of the same prompt

The held-out tenth is chosen by hash from all prompts of a category, so that it is of the same kind as the rest; no
training prompt closely resembles a held-out one.

    python -m speculators.recipes.data.make_prompts quickstart --out quickstart_prompts.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from speculators.data.leakage import MAX_OVERLAP, five_grams, overlap

CATEGORIES = ("chat", "explanation", "code", "arithmetic", "rewriting", "summarising", "lists", "translation")
PER_CATEGORY = {"quickstart": 83, "smollm2": 550}
HELD_OUT = 8  # prompts of each category in quickstart
MIN_PASSAGE_WORDS = 45
SLOT = re.compile(
    r"\{(?:(?P<name>[a-z_]+)(?P<index>\d?)(?P<beginning>~?)|(?P<number>[a-z]+):(?P<range>\d+\.\.\d+(?:/\d+)?))\}"
)
EXPRESSION = re.compile(r"\{=(\w+)([*+])(\w+)\}")


def digest(text: str) -> str:
    """Hashes a text, for every choice that must not depend on order: sha256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


class Deck:
    """Draws from a list without replacement, and reshuffles when it is empty."""

    def __init__(self, values: Sequence[str], rng: random.Random) -> None:
        self.values, self.rng, self.left = list(values), rng, list[str]()

    def draw(self) -> str:
        """Draws the next value."""
        if not self.left:
            self.left = self.rng.sample(self.values, len(self.values))
        return self.left.pop()


class Writer:
    """Fills the templates of one category.

    Args:
        slots: lists of values by slot name.
        rng: makes every choice.
    """

    def __init__(self, slots: dict[str, list[str]], *, rng: random.Random) -> None:
        self.rng = rng
        self.decks = {name: Deck(values, rng) for name, values in slots.items()}

    def fill(self, template: str) -> str:
        """Makes one prompt from a template; a slot that occurs twice gets one value."""
        chosen: dict[str, str] = {}
        text = template
        while match := SLOT.search(text):
            if match["number"]:
                value = chosen.setdefault(match["number"], self.number(match["range"]))
            else:
                value = self.value(match, chosen)
            before = text[: match.start()]
            if re.search(r"\b[Aa] $", before) and re.match(r"(?!uni|use|uk|eur|one)[aeiou]", value):
                before = before[:-1] + "n "
            text = before + value + text[match.end() :]
        text = EXPRESSION.sub(lambda match: self.compute(match, chosen), text)
        return text[0].upper() + text[1:]

    def value(self, match: re.Match[str], chosen: dict[str, str]) -> str:
        """Picks the value of a list slot: its own in this prompt, or else the next that no sibling slot has."""
        name, key = match["name"], match["name"] + match["index"]
        taken = {value for other, value in chosen.items() if other.rstrip("0123456789") == name}
        while key not in chosen:
            drawn = self.decks[name].draw()
            if drawn not in taken:
                chosen[key] = self.beginning(drawn) if match["beginning"] else drawn
        return chosen[key]

    def beginning(self, passage: str) -> str:
        """Cuts a passage after a whole sentence, at the earliest after `MIN_PASSAGE_WORDS` words."""
        sentences = re.split(r"(?<=[.?!]) (?=[A-Z])", passage)
        beginnings = [" ".join(sentences[:end]) for end in range(1, len(sentences) + 1)]
        return self.rng.choice([text for text in beginnings if len(text.split()) >= MIN_PASSAGE_WORDS])

    def number(self, text: str) -> str:
        """Draws a number from a range such as `5..60/5`."""
        bounds, _, step = text.partition("/")
        low, high = (int(bound) for bound in bounds.split(".."))
        return str(self.rng.randrange(low, high + 1, int(step or 1)))

    @staticmethod
    def compute(match: re.Match[str], chosen: dict[str, str]) -> str:
        """Evaluates `{=a*b}` or `{=a+b}`; each operand is a number slot of the prompt, or digits."""
        left, right = (int(chosen.get(operand, operand)) for operand in (match[1], match[3]))
        return str(left * right if match[2] == "*" else left + right)


def read_parts(category: str) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Reads a category's hand-written prompts, its templates, and the values of their slots, shared ones included."""
    folder = Path(__file__).parent
    shared = json.loads((folder / "parts_shared.json").read_text(encoding="utf-8"))
    parts = json.loads((folder / f"parts_{category}.json").read_text(encoding="utf-8"))
    return parts["prompts"], parts["templates"], shared["slots"] | parts["slots"]


def prompts_of(category: str, seed: int) -> Iterator[tuple[str, str]]:
    """Streams prompts of a category without end: the hand-written ones, then one of each template in turn.

    Yields:
        Prompt and template ("" for hand-written ones); no prompt twice.

    Raises:
        RuntimeError: the templates are exhausted.
    """
    prompts, templates, slots = read_parts(category)
    rng = random.Random(f"{seed} {category}")
    writer = Writer(slots, rng=rng)
    seen: set[str] = set()
    for prompt in rng.sample(prompts, len(prompts)):
        seen.add(prompt)
        yield prompt, ""
    order = rng.sample(templates, len(templates))
    while True:
        count = len(seen)
        for template in order:
            for _ in range(100):
                prompt = writer.fill(template)
                if prompt not in seen:
                    seen.add(prompt)
                    yield prompt, template
                    break
        if len(seen) == count:
            raise RuntimeError(f"the templates of {category} give no more than {count} different prompts")


def held_out(category: str, seed: int) -> list[tuple[str, str]]:
    """Picks the held-out prompts of a category, with their templates: the first of quickstart's prompts by hash."""
    first = islice(prompts_of(category, seed), PER_CATEGORY["quickstart"])
    return sorted(first, key=lambda row: digest(row[0]))[:HELD_OUT]


def train_prompts(category: str, tests: Sequence[str], seed: int) -> Iterator[tuple[str, str]]:
    """Streams the prompts of a category that closely resemble no test prompt of any category."""
    guarded = [five_grams(prompt) for prompt in tests]
    for prompt, template in prompts_of(category, seed):
        grams = five_grams(prompt)
        if all(overlap(test, grams) <= MAX_OVERLAP for test in guarded):
            yield prompt, template


def make(name: str, seed: int = 0) -> list[dict[str, object]]:
    """Makes the rows of one set.

    Args:
        name: `quickstart` (664 rows, 64 of them held out) or `smollm2` (4400 training rows, which begin with those of
            quickstart and never contain the 64).
        seed: seed of all choices.

    Returns:
        Rows with id, category, split, messages, and a hash of the template ("" when hand-written); categories in turn.
    """
    small = name == "quickstart"
    test_rows = {category: held_out(category, seed) for category in CATEGORIES}
    guarded = [prompt for rows in test_rows.values() for prompt, _ in rows]
    per_category = []
    for category, tests in test_rows.items():
        stream = islice(train_prompts(category, guarded, seed), PER_CATEGORY[name] - HELD_OUT * small)
        split = [("test", *row) for row in tests if small] + [("train", *row) for row in stream]
        start = 1 if small else HELD_OUT + 1
        per_category.append([make_row(category, start + i, *row) for i, row in enumerate(split)])
    return [row for together in zip(*per_category, strict=True) for row in together]


def make_row(category: str, number: int, split: str, prompt: str, template: str) -> dict[str, object]:
    """Makes one row; its number is the same in every set."""
    messages = [{"role": "user", "content": prompt}]
    return {
        "id": f"{category}-{number:04d}",
        "category": category,
        "split": split,
        "messages": messages,
        "template": digest(template)[:8] if template else "",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes a set to standard output or to a file."""
    parser = argparse.ArgumentParser(description="Write the prompts of a shipped recipe as JSON lines.")
    parser.add_argument("set", choices=sorted(PER_CATEGORY))
    parser.add_argument("--out", type=Path, help="the file to write (default: standard output)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = [{key: row[key] for key in row if key != "template"} for row in make(options.set, options.seed)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
