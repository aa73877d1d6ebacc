"""One healthy run for all tests of the doctor."""

from __future__ import annotations

import pytest
from clinic import RECIPE, TALKS, Clinic, long_talks, make_verifier, talk, write_talks
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
    """A verifier, its answers, and a run that learnt them by heart; read-only."""
    home = tmp_path_factory.mktemp("clinic")
    verifier = make_verifier(home / "verifier", steps=400)
    prompts = write_talks(home / "prompts.jsonl", [talk(subject)[:1] for subject in TALKS])
    data = write_talks(home / "data.jsonl", [*long_talks(), *(talk(subject) for subject in TALKS)])
    spec = Spec(home)
    recipe = RECIPE.format(verifier=verifier, data=data, max_tokens=256, options="", steps=300)
    (home / "clinic.toml").write_text(recipe)
    outcome = spec("run", home / "clinic.toml", "--runs", spec.runs, "--quiet")
    assert outcome.code == 0, outcome.err
    (run,) = spec.runs.glob("clinic-*")
    engine = Engine(verifier, dtype="float32")
    suite = load_suite(Suite(name="prompts", path=str(prompts)))
    answers = Answers.of(engine, suite, range(5), max_new_tokens=80, source="13 prompts")
    return Clinic(run=run, cache=spec.cache, verifier=verifier, prompts=prompts, answers=answers)
