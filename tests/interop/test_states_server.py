"""Hidden states of the real SmolLM2 from a real vLLM server equal the verifier's own, and train the same."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from foreign import vllm
from serving import free_port, running, vllm_serve

from speculators.cli import main
from speculators.verifier.engine import Engine

pytestmark = pytest.mark.interop

STATES_TOLERANCE = 1e-2
LOSS_TOLERANCE = 1e-2
# Both sides use float32, with a few dozen conversations and a few updates; nothing is evaluated.
SHORT = (
    'data.states_dtype="float32"',
    "data.sources=[{ path = 'data/quickstart.jsonl', split = 'train', take = 48 }]",
    "schedule.max_steps=6",
    "schedule.evaluate_every=100",
    "benchmark.suites=[]",
)


@attrs.frozen
class Server:
    """A server of states that `spec serve-states quickstart` runs.

    Attributes:
        folder: shared with it.
        settings: of the command line, by which it is used.
    """

    folder: Path
    settings: tuple[str, ...]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server started as a user would, and stopped by Ctrl-C."""
    work = tmp_path_factory.mktemp("states")
    port = free_port()
    folder = work / "shared"
    server_settings = ('data.hidden_states="server"', f'data.server.endpoints=["http://127.0.0.1:{port}"]')
    used = (*SHORT, *server_settings, f'data.server.folder="{folder}"', "data.server.concurrency=4")
    command = [sys.executable, "-m", "speculators.cli", "serve-states", "quickstart", *flags(used)]
    command += ["--port", str(port), "--vllm", str(vllm().folder / "bin" / "vllm")]
    with running(command, port, work) as process:
        yield Server(folder, used)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def flags(settings: tuple[str, ...]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def spec(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def updates(runs: Path) -> list[float]:
    """Reads the loss of each update so far of the only run in a folder."""
    lines = [line for log in runs.glob("*/events.jsonl") for line in log.read_text().splitlines()]
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "StepEvent"]


def checked(*settings: str) -> tuple[int, dict[str, Any]]:
    code, out, err = spec("data", "quickstart", "--check-states", "--sample", 8, "--json", *flags(settings))
    assert out, err
    return code, json.loads(out)


def test_the_servers_states_are_the_verifiers_own(server: Server) -> None:
    """Each layer's states are within 1e-2 and nearest to the same layer, for conversations from the shortest to the
    longest."""
    code, report = checked(*server.settings)
    assert (code, report["problems"]) == (0, [])
    assert [layer["layer"] for layer in report["layers"]] == [2, 15, 27, 30]
    assert report["tokens"] > 500
    print({layer["layer"]: layer["error"] for layer in report["layers"]})
    for layer in report["layers"]:
        assert layer["error"] < STATES_TOLERANCE
        assert layer["nearest"] == layer["layer"]


def test_a_wrong_layer_id_is_named(server: Server) -> None:
    """A recipe that reads other layers than the server gives is detected by the note and, without it, by the states."""
    other = (*server.settings, "algorithm.target_layer_ids=[3, 16, 27]")
    code, out, err = spec("data", "quickstart", "--check-states", *flags(other))
    assert (code, out) == (1, "")
    assert "was started for different states" in err
    note = server.folder / "serving.json"
    original = note.read_text()
    note.unlink()
    code, report = checked(*other)
    note.write_text(original)
    assert code == 1
    assert report["problems"] == ["the states of layer 3 match layer 2's", "the states of layer 16 match layer 15's"]


def test_training_gives_the_same_losses(server: Server, tmp_path: Path) -> None:
    """The losses of some updates are within 1% of those with states captured in process."""
    losses = {}
    for name, settings in {"server": server.settings, "cached": (*SHORT, 'data.hidden_states="cached"')}.items():
        code, _, err = spec("run", "quickstart", "--runs", tmp_path / name, *flags(settings))
        assert code == 0, err
        losses[name] = updates(tmp_path / name)
    print(losses)
    assert len(losses["cached"]) == len(losses["server"]) == 6
    for ours, theirs in zip(losses["cached"], losses["server"], strict=True):
        assert theirs == pytest.approx(ours, rel=LOSS_TOLERANCE)
    assert {path.name for path in server.folder.iterdir()} == {"serving.json"}


def test_answers_of_a_server_are_the_verifiers_own(engine: Engine, tmp_path: Path) -> None:
    """Greedy answers in float32 equal the verifier's in process; sampled ones are the same for the same seed."""
    questions = ["Name three colours.", "What is a tree?", "How do I boil an egg?", "Write a line about rain."]
    rows = [{"id": str(n), "messages": [{"role": "user", "content": text}]} for n, text in enumerate(questions)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answered(name: str, settings: str, *by: object) -> str:
        made = "--set", f'data.regenerate={{max_new_tokens=48, dtype="float32", {settings}}}'
        code, _, err = spec("regenerate", "quickstart", prompts, "--out", tmp_path / name, *made, *by)
        assert code == 0, err
        return (tmp_path / name).read_text()

    with vllm_serve(engine.folder, tmp_path, "--max-model-len", "512") as url:
        by = "--endpoint", f"{url}/v1"
        greedy = answered("greedy.jsonl", "temperature=0.0", *by)
        sampled = [answered(f"{n}.jsonl", "temperature=1.0, seed=5", *by, "--concurrency", n) for n in (1, 4)]
        assert sampled[0] != answered("other.jsonl", "temperature=1.0, seed=6", *by)
    assert greedy == answered("own.jsonl", "temperature=0.0")
    assert sampled[0] == sampled[1] != greedy
    facts = json.loads((tmp_path / "greedy.jsonl.json").read_text())
    assert (facts["engine"]["engine"], facts["engine"]["version"][:6]) == ("vllm", "0.32.0")


def test_training_streams_from_two_servers_of_which_one_dies(tmp_path: Path) -> None:
    """Two gloo processes train on the states of two vLLM servers. One is killed in the middle: training goes on, and
    the losses are within 1% of those of one process that computes the states itself."""
    # Two rows a step, one for each process.
    settings, ports = (*SHORT, "schedule.row_tokens=1024"), (free_port(), free_port())
    shared = f'data.server.folder="{tmp_path / "shared"}"'
    serve = [sys.executable, "-m", "speculators.cli", "serve-states", "quickstart", *flags((*settings, shared))]
    serve += ["--vllm", str(vllm().folder / "bin" / "vllm")]
    urls = ", ".join(f'"http://127.0.0.1:{port}"' for port in ports)
    streamed = ('data.hidden_states="streamed"', f"data.server.endpoints=[{urls}]", shared, "data.server.concurrency=4")
    command = [sys.executable, "-m", "speculators.cli", "run", "quickstart", "--runs", str(tmp_path / "streamed")]
    command += [*flags((*settings, *streamed)), "--nproc", "2"]
    log = tmp_path / "trainers.log"
    with (
        running([*serve, "--port", str(ports[0])], ports[0], tmp_path) as dies,
        running([*serve, "--port", str(ports[1])], ports[1], tmp_path),
        log.open("w") as err,
        subprocess.Popen(command, stderr=err) as trainers,
    ):
        while trainers.poll() is None and not updates(tmp_path / "streamed"):
            time.sleep(0.2)
        # The program that `spec serve-states` runs has a process group of its own.
        for child in Path(f"/proc/{dies.pid}/task/{dies.pid}/children").read_text().split():
            os.killpg(int(child), signal.SIGKILL)
        assert trainers.wait(600) == 0, log.read_text()
    assert "is left out after 3 failures" in " ".join(log.read_text().split())
    online = flags((*settings, 'data.hidden_states="online"'))
    code, _, message = spec("run", "quickstart", "--runs", tmp_path / "online", *online)
    assert code == 0, message
    ours, theirs = updates(tmp_path / "online"), updates(tmp_path / "streamed")
    print(ours, theirs)
    assert len(ours) == len(theirs) == 6
    assert theirs == pytest.approx(ours, rel=LOSS_TOLERANCE)
