"""`spec serve-states` prints its command, starts the program and stops it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Spec

# Stands for vLLM: writes down how it was called, then serves until it is asked to stop.
PROGRAM = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
home = Path({home!r})
def stop(*_):
    (home / "stopped").write_text("once") if not (home / "stopped").exists() else (home / "stopped").write_text("twice")
    if not {deaf}:
        sys.exit(0)
signal.signal(signal.SIGINT, stop)
call = {{"arguments": sys.argv[1:], "path": os.environ["PYTHONPATH"], "group": os.getpgrp(), "pid": os.getpid()}}
(home / "called.tmp").write_text(json.dumps(call))
(home / "called.tmp").rename(home / "called")
time.sleep({seconds})
sys.exit(7)
"""


def program(home: Path, *, seconds: float = 60.0, deaf: bool = False) -> Path:
    file = home / "fake-vllm"
    file.write_text(PROGRAM.format(python=sys.executable, home=str(home), seconds=seconds, deaf=deaf))
    file.chmod(0o755)
    return file


def test_the_command_is_printed_and_nothing_is_started(tmp_path: Path) -> None:
    """It has the arguments that the recipe's verifier and layers need; everything after -- is passed on."""
    spec = Spec(tmp_path)
    outcome = spec("serve-states", "smoke", "--print", "--port", "9001", "--", "--tensor-parallel-size", "2")
    assert outcome.code == 0, outcome.err
    arguments = shlex.split(outcome.out)
    command = arguments[arguments.index("vllm") :]
    assert command[:2] == ["vllm", "serve"]
    assert Path(command[2]).is_dir()
    assert command[command.index("--port") + 1] == "9001"
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert not (spec.cache / "served").exists()
    same = spec(
        "serve-states", "smoke", "--print", "--json", "--port", "9001", "--", "--tensor-parallel-size", "2"
    ).json
    assert same["command"] == command


@pytest.mark.parametrize(
    ("endpoint", "options", "place"),
    [
        ("http://127.0.0.1:8000", (), ["127.0.0.1", "8000"]),
        ("http://localhost:9100/v1", (), ["localhost", "9100"]),
        ("http://[::1]:9100", (), ["::1", "9100"]),
        ("http://gpus", (), ["gpus", "80"]),
        ("http://gpus:9100", ("--host", "0.0.0.0", "--port", "9200"), ["0.0.0.0", "9200"]),
    ],
)
def test_it_listens_where_the_recipe_asks(
    tmp_path: Path, endpoint: str, options: tuple[str, ...], place: list[str]
) -> None:
    """Capture with the same recipe finds the server; --host and --port override the address."""
    settings = ("--set", f'data.server.endpoints=["{endpoint}", "http://elsewhere:1"]', *options)
    command = Spec(tmp_path)("serve-states", "smoke", "--print", "--json", *settings).json["command"]
    assert [command[command.index(name) + 1] for name in ("--host", "--port")] == place


def test_json_without_print_is_a_usage_error(tmp_path: Path) -> None:
    """JSON output would look as if the server had started."""
    outcome = Spec(tmp_path)("serve-states", "smoke", "--json")
    assert outcome.code == 2
    assert outcome.json.keys() == {"errors"}
    assert "--json: needs --print" in outcome.err


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    """A hint says that vLLM has its own environment."""
    outcome = Spec(tmp_path)("serve-states", "smoke", "--vllm", "no-such-vllm")
    assert (outcome.code, outcome.out) == (1, "")
    assert "no-such-vllm: no such program\nvLLM has an environment of its own" in outcome.err


def test_the_servers_exit_code_is_ours(tmp_path: Path) -> None:
    """The connector is on the server's path, and the folder records what the server was started for."""
    spec = Spec(tmp_path)
    outcome = spec("serve-states", "smoke", "--vllm", program(tmp_path, seconds=0.0))
    assert outcome.code == 7
    called = json.loads((tmp_path / "called").read_text())
    assert called["arguments"][0] == "serve"
    assert called["path"].partition(":")[0].endswith("speculators/servers/connector")
    (folder,) = (spec.cache / "served").glob("[!.]*")
    assert json.loads((folder / "serving.json").read_text())["layer_ids"]
    assert str(folder) in outcome.err


@pytest.mark.parametrize(("how", "deaf"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_it_stops_when_we_are_stopped(tmp_path: Path, how: signal.Signals, deaf: bool) -> None:
    """The server is asked once; if it does not react, it is killed after its grace period."""
    code = (
        "import os, sys\n"
        "from speculators.servers.states_server import run_until_stopped\n"
        "try:\n"
        "    run_until_stopped([sys.argv[1]], {**os.environ, 'PYTHONPATH': ''}, grace=0.3)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(program(tmp_path, deaf=deaf))])
    until = time.monotonic() + 60
    while not (tmp_path / "called").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    called = json.loads((tmp_path / "called").read_text())
    assert called["group"] == called["pid"]
    child.send_signal(how)
    assert child.wait(timeout=30) == 130
    assert (tmp_path / "stopped").read_text() == "once"
    with pytest.raises(ProcessLookupError):
        os.kill(called["pid"], 0)
