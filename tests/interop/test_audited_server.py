"""The audit of a real vLLM server: it passes the run's speculator, and names what is wrong with sabotaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sabotage import later_layers
from serving import vllm_serve

from speculators.cli import main

pytestmark = pytest.mark.interop

ARGUMENTS = ("--max-model-len", "1024", "--max-num-seqs", "4", "--per-request-spec-decode-metrics", "detailed")
PROMPTS = 6


def _audit(run, served, work, capsys):
    with vllm_serve(served, work, *ARGUMENTS) as url:
        capsys.readouterr()
        code = main(
            ["bench", str(run), "--engine", "vllm", "--endpoint", url, "--audit", "--prompts", str(PROMPTS), "--json"]
        )
        printed = capsys.readouterr()
    assert printed.out, printed.err
    return code, json.loads(printed.out)


def test_vllm_drafts_round_for_round_as_replay_predicts(run_of, tmp_path, capsys):
    """In float32 every round of every answer accepts what is predicted for the server's own tokens."""
    run = run_of("quickstart_short")
    code, audit = _audit(run, run / "speculator", tmp_path, capsys)
    assert (code, audit["differing"], audit["tally"]["foreign_tokens"]) == (0, [], 0)
    assert audit["source"].startswith("metrics.speculative_decoding")
    assert audit["tally"]["rounds"] == audit["tally"]["agreeing"] + audit["tally"]["near_ties"]
    assert audit["version"].startswith("0.32.0")
    # Else agreement would prove nothing.
    assert audit["tally"]["served_tau"] > 1.1


def test_vllm_with_a_sabotaged_speculator_is_named(run_of, tmp_path, capsys):
    """vLLM serves the altered checkpoint without complaint, with the same tokens, and the audit says what it is.

    A server takes a minute to start, so this is the one fault that tau does not show. A server in this process serves
    all of them (tests/servers/test_audit_sabotage.py), and RESULTS.md has what vLLM did with each.
    """
    run = run_of("quickstart_short")
    spoilt = Path(shutil.copytree(run / "speculator", tmp_path / "spoilt"))
    finding = later_layers(spoilt)
    code, audit = _audit(run, spoilt, tmp_path, capsys)
    assert (code, audit["tally"]["foreign_tokens"]) == (1, 0)
    assert [each["what"] for each in audit["explanations"] if each["explains"]] == [finding]
    # By tau alone this goes unnoticed: with the layers one later it is the same to the last digit.
    assert audit["differing"]
    assert audit["patterns"]
