"""`vllm serve` of a run's `speculator/` folder accepts over HTTP what was predicted."""

from __future__ import annotations

import json

import pytest
from serving import vllm_serve

from speculators.cli import main
from speculators.servers.endpoint import Endpoint

pytestmark = pytest.mark.interop

ARGUMENTS = ("--max-model-len", "1024", "--max-num-seqs", "4")


def _bench(capsys, *arguments):
    capsys.readouterr()
    code = main(["bench", *map(str, arguments), "--json", "--quiet"])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return code, json.loads(printed.out)


def test_the_server_accepts_what_was_predicted(run_of, engine, tmp_path, capsys):
    """Each prompt takes as many rounds as replay predicts, with one and with two concurrent requests; the ledger
    agrees; a chat gets the verifier's own answer; a speed-up has a baseline of the same kind."""
    run = run_of("quickstart_short")
    (bench,) = (json.loads(file.read_text()) for file in (run / "bench").glob("*.json"))
    (predicted,) = (s for s in bench["settings"] if (s["temperature"], s["num_speculative_tokens"]) == (0.0, 3))
    speculative = vllm_serve(run / "speculator", tmp_path, *ARGUMENTS)
    with speculative as url, vllm_serve(engine.folder, tmp_path, *ARGUMENTS) as plain:
        arguments = (run, "--engine", "vllm", "--endpoint", url, "--temperature", 0)
        code, alone = _bench(capsys, *arguments, "--baseline-endpoint", plain)
        assert code == 0
        _, together = _bench(capsys, *arguments, "--concurrency", 2)
        question = {"role": "user", "content": "Name three colours."}
        request = {"model": alone["model"], "messages": [question], "temperature": 0, "max_tokens": 24}
        content = Endpoint(url=url).post("/v1/chat/completions", request)["choices"][0]["message"]["content"]
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
    assert content == engine.tokenizer.decode(own, skip_special_tokens=True)
