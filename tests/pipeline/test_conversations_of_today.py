"""Tool calls and reasoning under the templates of today, end to end: trained on, shown, regenerated, benchmarked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import GLM45, HARMONY, QWEN3, QWEN35, R1, VOCAB, Kind
from command import Outcome, Spec

from speculators.events import ignore
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.setup import make_context
from speculators.recipe.load import load_recipe
from speculators.runs.places import Places
from speculators.training.world import World
from speculators.verifier.tiny import make_tiny_verifier

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def called(city: str) -> dict[str, Any]:
    """A conversation that calls a tool, reads its result, and goes on."""
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'},
    }
    messages = [
        {"role": "user", "content": f"Is it wet in {city}?"},
        {"role": "assistant", "content": None, "reasoning_content": "I should look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": f"rain in {city}"},
        {"role": "assistant", "content": "It is.", "reasoning_content": "Rain is wet."},
        {"role": "user", "content": "And tomorrow?"},
        {"role": "assistant", "content": "Nobody knows.", "reasoning_content": "Far away."},
    ]
    return {"id": f"tools-{city}", "messages": messages, "tools": [WEATHER]}


def reasoned(subject: str) -> dict[str, Any]:
    """A conversation with reasoning in one turn."""
    answer = {"role": "assistant", "content": f"A {subject} is a plant.", "reasoning_content": "Plants have leaves."}
    return {"id": f"reasons-{subject}", "messages": [{"role": "user", "content": f"What is a {subject}?"}, answer]}


ROWS = [called("Oslo"), reasoned("tree"), called("Rome"), reasoned("bush")]
SUITE = [
    {**called("Bern"), "id": "answered"},
    {**called("Lima"), "id": "open", "messages": called("Lima")["messages"][:3]},
    {"question_id": "turns", "turns": ["What is a fern?", "And a moss?"]},
]


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Work:
    """The command line with one verifier, one file of rows and one suite."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        kind.verifier(folder / "verifier")
        write("rows.jsonl", ROWS)
        write("suite.jsonl", SUITE)
        self.spec = Spec(folder)
        self.settings = [
            'verifier.model="./verifier"',
            'data.sources=[{path="./rows.jsonl"}]',
            "data.max_tokens=512",
            'benchmark.suites=[{name="own", path="./suite.jsonl"}]',
            "benchmark.max_new_tokens=12",
            "benchmark.live_prompts=1",
            "schedule.max_steps=2",
            "schedule.evaluate_every=2",
            "schedule.checkpoint_every=2",
        ]

    def __call__(self, verb: str, *arguments: object, **replaced: str) -> Outcome:
        settings = [*self.settings, *(f"data.{key}={value}" for key, value in replaced.items())]
        options = [part for setting in settings for part in ("--set", setting)]
        outcome = self.spec(verb, "smoke", *arguments, *options)
        assert outcome.code == 0, outcome.err + outcome.out
        return outcome

    def data(self, *arguments: object, **replaced: str) -> Any:
        return self("data", "--json", *arguments, **replaced).json


@pytest.fixture
def work(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """The command line in an empty folder, with a tiny verifier of one kind of template."""
    monkeypatch.chdir(tmp_path)
    return Work(tmp_path, request.param)


TODAY = pytest.mark.parametrize("work", [HARMONY, QWEN35, GLM45], ids=["harmony", "qwen3.5", "glm4.5"], indirect=True)


@TODAY
def test_conversations_are_trained_on_shown_and_benchmarked(work: Work) -> None:
    """Every assistant turn is supervised, calls included; both kinds are counted and coloured; the suite has a tau."""
    outcome = work("run", "--runs", work.spec.runs, "--json")
    (setting, *_) = outcome.json["bench"]["settings"]
    assert setting["exact"]["prompts"] == len(SUITE)
    view = work.data("--sample", 0, "--id", "tools-Oslo", "--id", "reasons-tree")
    assert (view["rows"]["conversations"], view["rows"]["skipped"]) == (len(ROWS), {})
    assert view["kinds"] == {
        "reasoning": 4,
        "reasoning of earlier turns": 2,
        "tools": 2,
        "tool calls": 2,
        "tool results": 2,
    }
    assert "tool calls" not in view["dropped"]
    pieces = [piece for shown in view["shown"] for piece in shown["pieces"]]
    supervised = "".join(piece["text"] for piece in pieces if piece["supervised"])
    for said in ("I should look.", "weather", "It is.", "Nobody knows.", "A tree is a plant."):
        assert said in supervised
    assert "rain in Oslo" not in supervised
    assert {piece["kind"] for piece in pieces if piece["supervised"]} == {"", "reasoning", "tool calls"}
    assert "tool results" in {piece["kind"] for piece in pieces}


@TODAY
def test_regenerated_conversations_are_the_verifiers_own(work: Work) -> None:
    """Each turn is written on the verifier's own history, with the data's calls and results; its ids are trained on."""
    work("regenerate", "rows.jsonl", "--out", "new.jsonl", regenerate="{max_new_tokens=24}")
    rows = [json.loads(line) for line in Path("new.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    first = rows[0]
    assert [entry["turn"] for entry in first["token_ids"]] == [1, 3, 5]
    assert first["tools"] == [WEATHER]
    # The result answers this call, so both stay; the answers around them are the verifier's.
    assert first["messages"][1]["tool_calls"][0]["function"]["name"] == "weather"
    assert first["messages"][2]["content"] == "rain in Oslo"
    assert first["messages"][3]["content"] != "It is."
    view = work.data("--sample", 4, sources='[{path="./new.jsonl"}]')
    assert (view["rows"]["conversations"], view["rows"]["skipped"]) == (len(ROWS), {})
    assert view["kinds"]["token ids"] == len(ROWS)
    assert view["on_policy"]["verdict"] == "greedy"
    assert view["on_policy"]["agreement"] > 0.99
    answers = sum(len(entry["answer"]) for row in rows for entry in row["token_ids"])
    assert view["rows"]["supervised"] == answers


@pytest.mark.parametrize("work", [QWEN3, R1], ids=["adds an empty block", "drops reasoning"], indirect=True)
def test_a_template_that_rewrites_answers_does_not_touch_the_verifiers_own(work: Work) -> None:
    """Kept as text, they would be rendered with a block that the verifier never wrote, or without their reasoning."""
    regenerate = {"regenerate": "{max_new_tokens=24}"}
    places = Places(runs=work.spec.runs, cache=work.spec.cache)
    settings = [*work.settings, f"data.regenerate={regenerate['regenerate']}"]
    prepared_conversations(make_context(load_recipe("smoke", settings), places, World(), ignore))
    view = work.data("--sample", 4, **regenerate)
    assert view["rows"]["conversations"] == len(ROWS)
    assert view["on_policy"]["agreement"] > 0.99
    assert "off-policy" not in {finding["rule"] for finding in view["findings"]}


@pytest.mark.parametrize("work", [QWEN35], ids=["qwen3.5"], indirect=True)
def test_answers_of_another_tokenizer_are_refused(work: Work) -> None:
    """Their ids mean other text to this verifier: training on them would be silent nonsense."""
    work("regenerate", "rows.jsonl", "--out", "new.jsonl", regenerate="{max_new_tokens=8}")
    rows = [json.loads(line) for line in Path("new.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["token_ids"][0]["answer"][0] += 1
    write("other.jsonl", rows)
    settings = [part for setting in work.settings for part in ("--set", setting)]
    outcome = work.spec("data", "smoke", "--sample", 0, *settings, "--set", 'data.sources=[{path="./other.jsonl"}]')
    assert outcome.code == 1
    assert "token_ids were written with another tokenizer" in outcome.out


@pytest.mark.parametrize("work", [QWEN35], ids=["qwen3.5"], indirect=True)
def test_answers_of_another_verifier_with_the_same_tokenizer_are_a_warning(work: Work) -> None:
    """Nothing in their text or ids tells; the provenance beside them does."""
    work("regenerate", "rows.jsonl", "--out", "new.jsonl", regenerate="{max_new_tokens=8}")
    new = '[{path="./new.jsonl"}]'
    assert "wrote these answers" not in work("data", "--sample", 0, sources=new).err
    make_tiny_verifier(Path("verifier"), vocab_size=VOCAB, seed=1)
    QWEN35.tokenizer().save_pretrained("verifier")
    assert "verifier wrote these answers, whose weights are not" in work("data", "--sample", 0, sources=new).err
