"""`spec data` on the command line: its output, its stored files and its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command import Outcome, Spec

from speculators.events import ignore
from speculators.pipeline.context import Context
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.setup import make_context
from speculators.recipe.load import load_recipe
from speculators.runs.places import Places
from speculators.runs.stages import is_prepared
from speculators.training.world import World
from speculators.verifier import hub

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TALK = [{"role": "user", "content": "What is a tree?"}, {"role": "assistant", "content": "A plant that became tall."}]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """The command line in an empty folder, with its own cache."""
    monkeypatch.chdir(tmp_path)
    return Spec(tmp_path)


@pytest.fixture
def local(tiny_verifier: Path, spec: Spec) -> Path:
    """A copy of the tiny verifier that a test may change."""
    return Path(shutil.copytree(tiny_verifier, "tiny"))


def context_of(spec: Spec, *overrides: str) -> Context:
    """Makes the context that `spec run smoke` would use."""
    places = Places(runs=spec.runs, cache=spec.cache)
    return make_context(load_recipe("smoke", overrides), places, World(), ignore)


def look(spec: Spec, *arguments: object) -> Outcome:
    return spec("data", "smoke", "--sample", 0, *arguments)


def data(*conversations: object) -> tuple[str, str]:
    lines = "".join(json.dumps(row if isinstance(row, dict) else {"messages": row}) + "\n" for row in conversations)
    Path("rows.jsonl").write_text(lines)
    return "--set", 'data.sources=[{path="./rows.jsonl"}]'


def template(folder: Path, text: str) -> tuple[str, str]:
    (folder / "chat_template.jinja").write_text(text)
    return "--set", 'verifier.model="./tiny"'


def findings(outcome: Outcome) -> dict[str, dict]:
    return {finding["rule"]: finding for finding in outcome.json["findings"]}


def test_a_conversation_the_numbers_and_the_findings_are_printed(spec: Spec) -> None:
    """The mask is in brackets, special tokens have names, the verdict has a reason; progress goes to stderr."""
    outcome = spec("data", "smoke", "--sample", 2)
    assert outcome.code == 0, outcome.err
    assert re.search(r"<\|im_start\|>assistant\n⟦[^⟧]+⟧", outcome.out)
    for text in ("24 conversations", "of new text", "4 prompts of quickstart: none is trained on", "off-policy"):
        assert text in outcome.out
    assert "prepare done" in outcome.err
    assert "on-policy done" in outcome.err
    assert "\x1b" not in outcome.out


def test_looking_prepares_for_the_run_once(spec: Spec) -> None:
    """A second call and a run reuse the stage; nothing else is made."""
    look(spec, "--quiet")
    again = look(spec)
    assert "prepare already done" in again.err
    context = context_of(spec)
    assert is_prepared(context.plan, context.places)
    assert not spec.runs.exists()
    made = [
        folder.name
        for folder in spec.cache.iterdir()
        if any(not file.name.startswith(".") for file in folder.iterdir())
    ]
    assert set(made) == {"verifiers", "conversations"}


def test_json_has_everything_and_nothing_else_is_on_stdout(spec: Spec) -> None:
    """JSON has the values of the tables and the printed conversations with their mask."""
    outcome = look(spec, "--show", 2, "--json")
    values = outcome.json
    assert values["rows"]["conversations"] == 24
    assert 0 < values["rows"]["supervised_share"] < 1
    assert sum(part["count"] for part in values["rows"]["histogram"]) == 24
    (overlap,) = values["leakage"]["suites"].values()
    assert (overlap["prompts"], overlap["same"], overlap["near"]) == (4, 0, 0)
    assert values["on_policy"] is None
    assert len(values["shown"]) == 2
    assert {piece["supervised"] for piece in values["shown"][0]["pieces"]} == {True, False}


def test_conversations_are_chosen_by_id_or_by_number(spec: Spec) -> None:
    """`--id` chooses conversations; `--show 0` prints none; an unknown id is bad usage, with the nearest id."""
    ids = [shown["id"] for shown in look(spec, "--show", 3, "--json").json["shown"]]
    assert [shown["id"] for shown in look(spec, "--id", ids[2], "--json").json["shown"]] == [ids[2]]
    assert look(spec, "--show", 0, "--json").json["shown"] == []
    outcome = look(spec, "--id", ids[2] + "x")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"did you mean '{ids[2]}'?" in outcome.err


def test_a_leaked_prompt_fails_with_its_line(spec: Spec) -> None:
    """A training prompt of the suite is an error in the data, which the run would refuse, too."""
    leaked = "--set", 'data.sources=[{path="data/quickstart.jsonl", split="test", take=4}]'
    outcome = look(spec, *leaked, "--json")
    assert outcome.code == 1
    finding = findings(outcome)["leakage"]
    assert finding["level"] == "error"
    assert re.match(r".*quickstart\.jsonl:1 chat-\d+ is quickstart's chat-\d+", finding["examples"][0])
    assert outcome.json["leakage"]["same"] == 4
    assert spec("run", "smoke", *leaked, "--runs", spec.runs).code == 1


def test_rows_that_are_left_out_are_listed_with_file_and_line(spec: Spec) -> None:
    """Rows that the reader or the template refuses are listed with file and line; the rest is prepared."""
    long = [{"role": "user", "content": "q" * 300}, TALK[1]]
    mixed = data(TALK, TALK[:1], [TALK[0], *TALK], long, TALK)
    outcome = look(spec, *mixed, "--json")
    assert outcome.code == 0
    examples = {f["found"].partition(": ")[2]: f["examples"] for f in outcome.json["findings"] if f["examples"]}
    assert examples["no assistant turn"] == ["rows.jsonl:2"]
    assert examples["no supervised token within max_tokens"] == ["rows.jsonl:4 rows:4"]
    assert outcome.json["rows"]["conversations"] == 3


def test_a_mask_of_ones_fails_with_advice(spec: Spec, local: Path) -> None:
    """With markers around everything nothing can be trained on; the finding says why and what to do."""
    outcome = look(spec, *template(local, "{% generation %}{{ messages[1].content }}{% endgeneration %}"), *data(TALK))
    assert outcome.code == 1
    assert "error nothing to train on" in outcome.out
    assert "every token is supervised" in outcome.out
    assert "fix the template's {% generation %} markers" in outcome.out


def test_a_thinking_flag_that_differs_from_the_data_is_a_warning(spec: Spec, local: Path) -> None:
    """A warning appears if the template asks for reasoning by default and the answers have none."""
    outcome = look(spec, *template(local, THINKING), *data(TALK), "--json")
    finding = findings(outcome)["thinking flag"]
    assert (outcome.code, finding["level"]) == (0, "warning")
    assert "enable_thinking = false" in finding["todo"]


def test_answers_that_are_not_generated_yet_are_left_so(spec: Spec) -> None:
    """Prompts are shown and nothing is generated; once there are answers, those are inspected."""
    regenerate = (*data(TALK), "--set", "data.regenerate={max_new_tokens=4}")
    outcome = spec("data", "smoke", *regenerate)
    assert outcome.code == 0, outcome.err
    assert "none is generated yet, for 1 prompts" in outcome.out
    assert outcome.out.startswith("prompt rows.jsonl:1")
    assert "⟦" not in outcome.out
    assert not list((spec.cache / "regenerated").glob("*.jsonl"))
    prepared_conversations(context_of(spec, *regenerate[1::2]))
    after = spec("data", "smoke", *regenerate, "--json").json
    assert (after["waiting"], after["rows"]["conversations"]) == (None, 1)
    assert after["on_policy"]["tokens"] == after["rows"]["supervised"]


def test_answers_to_the_sources_of_the_recipe_take_the_place_of_its_regeneration(spec: Spec) -> None:
    """Without PROMPTS the recipe's own sources are answered, and a run trains on the file."""
    regenerate = (*data(TALK), "--set", "data.regenerate={max_new_tokens=4}")
    answered = spec("regenerate", "smoke", *regenerate, "--out", "answers.jsonl", "--json")
    assert answered.json["conversations"] == 1
    trained = ("--set", 'data.sources=[{path="answers.jsonl"}]', "--set", 'data.regenerate="none"')
    rows = look(spec, *trained, "--json").json["rows"]
    assert (rows["conversations"], rows["supervised"]) == (1, 4)


def test_a_hub_model_is_inspected_without_its_weights(
    spec: Spec, tiny_verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and tokenizer are fetched; weights only for the on-policy measure."""
    requests: list[list[str]] = []
    folder = Path(shutil.copytree(tiny_verifier, "snapshot"))
    weights = (folder / "model.safetensors").rename("weights")

    def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
        requests.append(patterns)
        if "*.safetensors" in patterns:
            shutil.copyfile(weights, folder / "model.safetensors")
        return folder

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    model = "--set", 'verifier.model="owner/model"'
    assert look(spec, *model).code == 0
    assert not any("*.safetensors" in patterns for patterns in requests)
    assert spec("data", "smoke", *model, "--sample", 1, "--json").json["on_policy"]["tokens"] > 0


BAD = {
    "an empty file": ("", 1, "empty"),
    "a broken line": ("{\n", 1, "no row of the sources can be used"),
    "only questions": (json.dumps({"messages": TALK[:1]}) + "\n", 1, "no assistant turn"),
    "binary": ("\0" * 9, 1, "binary, not JSONL"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_data_that_cannot_be_used_is_an_error_without_a_traceback(spec: Spec, mistake: str) -> None:
    """The exit code is 1, and the message names the fault."""
    content, code, message = BAD[mistake]
    Path("rows.jsonl").write_text(content)
    outcome = look(spec, "--set", 'data.sources=[{path="./rows.jsonl"}]')
    assert outcome.code == code
    assert message in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


def test_a_verifier_without_a_template_is_one_error(spec: Spec, local: Path) -> None:
    """A verifier without a chat template raises one error, because there is no mask without it."""
    (local / "chat_template.jinja").unlink()
    outcome = look(spec, "--set", 'verifier.model="./tiny"')
    assert (outcome.code, outcome.out) == (1, "")
    assert "has no chat template" in outcome.err


@pytest.mark.parametrize("arguments", [("--show", "-1"), ("--sample", "x"), ("--set", "data.max_tokens=0")])
def test_bad_usage_exits_with_2(spec: Spec, arguments: tuple[str, str]) -> None:
    """Bad usage exits with 2 before anything is made."""
    assert look(spec, *arguments).code == 2
    assert not spec.cache.exists()


def test_a_suites_question_is_held_out_though_a_system_message_stands_before_it(spec: Spec) -> None:
    """The user's first turn is kept out of training, even after a system message."""
    messages = [{"role": "system", "content": "Be brief."}, *TALK]
    Path("suite.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    suite = "--set", 'benchmark.suites=[{name="own", path="./suite.jsonl"}]'
    outcome = look(spec, *data(TALK), *suite, "--json")
    assert (outcome.code, outcome.json["leakage"]["same"]) == (1, 1)
