"""`vllm serve` of a run's `speculator/` folder, over HTTP, as a user would: what it accepts is what was predicted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign import vllm

from speculators.cli import main
from speculators.errors import ServerError
from speculators.verifier.endpoint import Endpoint, Retry

pytestmark = pytest.mark.interop

START_SECONDS = 300
ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4")


@contextlib.contextmanager
def serving(model: Path, work: Path) -> Iterator[str]:
    """Runs `vllm serve MODEL` until the block ends; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment, log = vllm(), work / f"{model.name}.log"
    command = [str(environment.folder / "bin" / "vllm"), "serve", str(model), *ARGUMENTS]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment.variables(), cwd=work, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, Endpoint(url=url, retry=Retry(times=0)), log)
            yield url
        finally:
            # It starts others of its own; all are in the session that was made for it.
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], endpoint: Endpoint, log: Path) -> None:
    for _ in range(START_SECONDS):
        assert process.poll() is None, f"vllm serve ended:\n{log.read_text()[-6000:]}"
        try:
            endpoint.get_text("/health")
        except ServerError:
            time.sleep(1)
        else:
            return
    raise AssertionError(f"vllm serve did not come up in {START_SECONDS} s:\n{log.read_text()[-6000:]}")


def _bench(capsys, *arguments):
    capsys.readouterr()
    code = main(["bench", *map(str, arguments), "--json", "--quiet"])
    told = capsys.readouterr()
    assert told.out, told.err
    return code, json.loads(told.out)


def test_what_is_served_is_what_was_predicted(run_of, engine, tmp_path, capsys):
    """Each prompt takes as many rounds as replay predicts, with one and with two requests at once; the ledger agrees; a
    chat is answered by the verifier's own words; a speed-up stands beside a baseline of the same kind."""
    run = run_of("quickstart")
    (bench,) = (json.loads(file.read_text()) for file in (run / "bench").glob("*.json"))
    (predicted,) = bench["settings"]
    with serving(run / "speculator", tmp_path) as url, serving(engine.folder, tmp_path) as plain:
        asked = (run, "--engine", "vllm", "--endpoint", url)
        code, alone = _bench(capsys, *asked, "--baseline-endpoint", plain)
        assert code == 0
        _, together = _bench(capsys, *asked, "--concurrency", 2)
        question = {"role": "user", "content": "Name three colours."}
        request = {"model": alone["model"], "messages": [question], "temperature": 0, "max_tokens": 24}
        told = Endpoint(url=url).post("/v1/chat/completions", request)["choices"][0]["message"]["content"]
    for result in (alone, together):
        (setting,) = result["settings"]
        assert setting["by_prompt"] == predicted["by_prompt"]
        assert setting["acceptance"]["tau"] == pytest.approx(predicted["exact"]["tau"])
        assert setting["pace"]["inter_token"]["p50"] > 0
    assert alone["settings"][0]["speed_up"] > 0
    assert alone["version"].startswith("0.32.0")
    code, ledger = _bench(capsys, run, "--ledger")
    assert (code, ledger["alarms"]) == (0, [])
    kinds = [entry["kind"] for line in ledger["lines"] for entry in line["entries"]]
    assert kinds.count("served") == 1
    ids = engine.tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)["input_ids"]
    (own,) = engine.generate([list(ids)], max_new_tokens=24, temperature=0.0)
    assert told == engine.tokenizer.decode(own, skip_special_tokens=True)
