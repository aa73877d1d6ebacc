"""The event log of a run is written as JSON lines and read back as the same typed events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.errors import ArtifactError
from speculators.events import (
    CapturedFacts,
    EvalEvent,
    Event,
    PreparedFacts,
    ProgressEvent,
    RunEvent,
    SaveEvent,
    StageEvent,
    StatesCheckFacts,
    StepEvent,
    SuiteFacts,
    TrainedFacts,
    WarningEvent,
    ignore,
)
from speculators.report.progress import stage_sentence
from speculators.runs.log import EventLog, RunLog

PREPARED = PreparedFacts(
    conversations=24, tokens=3000, supervised=1200, skipped={"no assistant turn": 3}, truncated=2, max_tokens=512
)
TRAINED = TrainedFacts(
    parameters=101402,
    vocabulary=512,
    draft_vocabulary=64,
    coverage=0.979,
    rare_ends=(7,),
    step=6,
    total_steps=8,
    tau=1.25,
)
STEP = StepEvent(
    step=1,
    total_steps=8,
    epoch=0,
    loss=2.5,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens=512,
    tokens_per_second=900.0,
    seconds_left=3.0,
    metrics={"accuracy_1": 0.25},
)
EVENTS: list[Event] = [
    RunEvent(folder=Path("/runs/a")),
    StageEvent(stage="verifier", status="skip", detail="/cache/verifiers/tiny"),
    StageEvent(stage="prepare", status="done", facts=PREPARED, seconds=2),
    StageEvent(
        stage="capture",
        status="done",
        facts=CapturedFacts(tokens=3000, bytes=10**9, folder="/cache/states/0", server="vllm 0.9"),
    ),
    StageEvent(stage="suite", status="done", facts=SuiteFacts(suite="quickstart", responses=16)),
    StageEvent(stage="check states", status="done", facts=StatesCheckFacts(compared_tokens=64, error=1e-3)),
    STEP,
    EvalEvent(step=1, tau=1.5, metrics={"accept_1": 0.5}),
    SaveEvent(step=1, path=Path("/runs/a/checkpoints/step-00000001"), best=True),
    WarningEvent(message="a [file] is cut"),
    StageEvent(stage="train", status="done", facts=TRAINED, seconds=60.5),
]


def written(folder: Path, *events: Event) -> Path:
    log = EventLog(ignore)
    for event in events:
        log(event)
    log.open(folder / "events.jsonl")
    return folder / "events.jsonl"


def test_events_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    """Every kind but progress is read back with all facts and the same class."""
    file = written(tmp_path, *EVENTS, ProgressEvent(stage="train", done=1))
    assert [entry.event for entry in RunLog.read(file).events] == EVENTS


def test_a_run_killed_in_the_middle_of_a_line_still_reads(tmp_path: Path) -> None:
    """The torn line is skipped; a resumed launch appends after it."""
    file = written(tmp_path, STEP)
    file.write_text(file.read_text() + '{"time": 1.0, "event": "StepEv\n' + file.read_text())
    assert RunLog.read(file).of(StepEvent) == [STEP, STEP]
    assert RunLog.read(file).updates() == [STEP]


def test_a_run_without_a_log_has_no_events(tmp_path: Path) -> None:
    """A missing file is not an error."""
    assert RunLog.read(tmp_path / "events.jsonl") == RunLog()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None}, "StepEvent: loss: must be a number, got nothing"),
        ({"step": 1.5}, "StepEvent: step: must be an integer, got 1.5"),
    ],
)
def test_a_damaged_event_is_named_with_its_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """The error names the file, the line and the value."""
    file = written(tmp_path, STEP)
    file.write_text(file.read_text() + json.dumps({**json.loads(file.read_text()), **change}) + "\n")
    with pytest.raises(ArtifactError) as caught:
        RunLog.read(file)
    assert f"{file}:2: damaged: {message}" in str(caught.value)


def test_logs_of_older_and_newer_versions_are_read(tmp_path: Path) -> None:
    """Logs without facts, with unknown facts and kinds, and with a metric that is not a number are read."""
    lines = [
        {
            "event": "StageEvent",
            "stage": "train",
            "status": "done",
            "detail": "1,000 trainable parameters",
            "seconds": 1,
        },
        {"event": "StageEvent", "stage": "train", "status": "done", "facts": {"colour": "blue"}},
        {"event": "DreamEvent", "of": "sheep"},
        {"event": "EvalEvent", "step": 3, "tau": 2, "metrics": {"accept_1": float("nan"), "accept_2": 0.5}},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = RunLog.read(tmp_path / "events.jsonl")
    older, newer = log.of(StageEvent)
    assert (older.facts, newer.facts) == (None, None)
    assert stage_sentence(older) == "1,000 trainable parameters"
    assert log.evaluations() == [EvalEvent(step=3, tau=2.0, metrics={"accept_2": 0.5})]


def test_sentences_are_made_from_facts() -> None:
    """The sentences show numbers with their units; nothing else parses them."""
    sentences = {event.stage: stage_sentence(event) for event in EVENTS if isinstance(event, StageEvent)}
    assert sentences["prepare"] == (
        "24 conversations, 3,000 tokens, 1,200 of them supervised; left out: 3 no assistant turn; 2 cut at 512 tokens"
    )
    assert sentences["capture"] == "3,000 tokens by vllm 0.9, 1.00 GB in /cache/states/0"
    assert sentences["train"] == (
        "101,402 trainable parameters; drafts 64 of 512 tokens, 97.90% of the supervised ones; end-of-turn tokens [7] "
        "are included although they are rare; best at update 6 of 8, acceptance length 1.250"
    )
