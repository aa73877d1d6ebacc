"""One healthy run for all tests of the doctor."""

from __future__ import annotations

import json

import pytest
from clinic import RECIPE, REGENERATE, Clinic, make_verifier
from command import Spec

from speculators.bench.suites import load_suite
from speculators.doctor.answers import Answers
from speculators.recipe.schema import Suite
from speculators.verifier.engine import Engine

SUBJECTS = (
    "a tree, the sea, old books, a small town, winter, bread, the moon, a river, music, wool, glass, a clock, salt"
)


@pytest.fixture(scope="session")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    """A verifier, a run that learnt its answers by heart, and these answers; read only."""
    home = tmp_path_factory.mktemp("clinic")
    verifier = make_verifier(home / "verifier")
    prompts = home / "prompts.jsonl"
    questions = [f"Tell me about {subject}." for subject in SUBJECTS.split(", ")]
    rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = Spec(home)
    (home / "clinic.toml").write_text(
        RECIPE.format(verifier=verifier, prompts=prompts, regenerate=REGENERATE, options="", steps=300)
    )
    told = spec("run", home / "clinic.toml", "--runs", spec.runs, "--quiet")
    assert told.code == 0, told.err
    (run,) = spec.runs.glob("clinic-*")
    engine = Engine(verifier, dtype="float32")
    suite = load_suite(Suite(name="prompts", path=str(prompts)))
    answers = Answers.of(engine, suite, range(5), max_new_tokens=32, source="13 prompts")
    return Clinic(run=run, cache=spec.cache, verifier=verifier, prompts=prompts, answers=answers)
