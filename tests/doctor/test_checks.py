"""Checks without a trained speculator: maps, tensors, config values, and a speculator that learnt nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import Spec

from speculators.config import ProposalConfig, SpeculatorsConfig, VerifierConfig
from speculators.contract import build_model
from speculators.doctor.config import _contradicts, flat
from speculators.doctor.data import PROMISED, _stored, check_data
from speculators.doctor.loads import finite
from speculators.doctor.speculator import TrainingRun
from speculators.doctor.stored import conversations_of
from speculators.doctor.vocabulary import map_problem
from speculators.facts import VerifierFacts
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.recipe.decoder import draft_decoder_config
from speculators.runs.places import Places

PROMPT, ANSWER = [{"role": "user", "content": "What is a tree?"}], {"role": "assistant", "content": "A tall plant."}
IDS = torch.tensor([1, 2, 5, 6])


def maps(ids: torch.Tensor, marked: torch.Tensor | None = None, size: int = 8) -> dict[str, torch.Tensor]:
    t2d = torch.zeros(size, dtype=torch.bool).index_fill_(0, ids if marked is None else marked, True)
    return {"d2t": ids - torch.arange(len(ids)), "t2d": t2d}


def test_a_sound_map_has_no_problem() -> None:
    """With t2d, without it, and with the whole vocabulary."""
    assert map_problem(IDS, maps(IDS), 8) == ""
    assert map_problem(IDS, {}, 8) == ""
    assert map_problem(torch.arange(8), {}, 8) == ""


@pytest.mark.parametrize(
    ("ids", "tensors", "words"),
    [
        (torch.tensor([1, 5, 2, 6]), {}, "draft id 1 is token 5, draft id 2 token 2"),
        (torch.tensor([1, 2, 2, 6]), {}, "1 tokens have several draft ids"),
        (torch.tensor([1, 2, 5, 9]), {}, "point outside the 8 tokens, the first to 9"),
        (IDS, maps(IDS, torch.tensor([1, 2, 5, 7])), "d2t and t2d disagree"),
        (IDS, maps(IDS, size=9), "the map of another verifier"),
        (IDS + torch.arange(4), {"d2t": IDS, "t2d": maps(IDS)["t2d"]}, "holds target ids, not offsets"),
    ],
)
def test_what_is_wrong_with_a_map_is_named(ids: torch.Tensor, tensors: dict[str, torch.Tensor], words: str) -> None:
    """Wrong order, repetition, out of range, disagreeing t2d, another verifier's map, ids instead of offsets."""
    assert words in map_problem(ids, tensors, 8)


def test_nan_and_infinity_are_wrong_and_zeros_are_a_warning() -> None:
    """Integer tensors are ids, not weights, and are left alone."""
    (check,) = finite({"a": torch.tensor([[1.0, torch.inf]]), "ids": torch.zeros(2, 2, dtype=torch.int64)})
    assert (check.result, "a (1 of 2)" in check.evidence) == ("wrong", True)
    (check,) = finite({"a": torch.zeros(2, 2), "bias": torch.zeros(2)})
    assert (check.result, "all zero: a:" in check.evidence) == ("warning", True)


def test_older_layouts_of_rotary_values_are_read_and_contradictions_seen() -> None:
    """A top-level rope_theta counts unless rope_parameters is there."""
    assert flat({"rope_theta": 5e5})["rope theta"] == 5e5
    scaled = flat({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (scaled["rope type"], scaled["rope scaling"]["factor"]) == ("linear", 2.0)
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    assert not _contradicts(1e4, "rope_theta", rope)
    assert not _contradicts({"type": "linear", "factor": 2.0}, "rope_scaling", rope)
    assert not _contradicts(None, "rope_scaling", rope)
    assert _contradicts(5e5, "rope_theta", rope)
    assert _contradicts({"type": "linear", "factor": 4.0}, "rope_scaling", rope)


def untrained(verifier: Path, folder: Path) -> Path:
    """A speculator with its verifier's tensors and random weights."""
    facts = VerifierFacts.read(verifier / "config.json")
    config = Eagle3SpeculatorConfig()
    torch.manual_seed(0)
    named = VerifierConfig(name_or_path=str(verifier), architectures=("LlamaForCausalLM",))
    kwargs = {
        **{field.name: getattr(config, field.name) for field in type(config).recipe_fields()},
        "verifier_name_or_path": str(verifier),
        "target_layer_ids": (1, 2, 3),
        "draft_vocab_size": facts.vocab_size,
        "transformer_layer_config": draft_decoder_config(facts, config),
        "speculators_config": SpeculatorsConfig(
            algorithm="eagle3", proposal_methods=(ProposalConfig(),), verifier=named
        ),
        "t2d": None,
        "d2t": None,
        "dtype": "float32",
        "seed": 0,
    }
    build_model("eagle3", facts, kwargs).save_pretrained(folder)
    return folder


def test_a_speculator_that_learnt_nothing_is_not_healthy(tmp_path: Path, tiny_verifier: Path) -> None:
    """Its files are sound; replay shows that its drafts are worthless."""
    folder = untrained(tiny_verifier, tmp_path / "speculator")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("one", "two or three", "four")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = Spec(tmp_path)("doctor", folder, "--prompts", tmp_path / "prompts.jsonl", "--json")
    assert outcome.code == 1, outcome.err
    checks = {f"{one['family']}/{one['name']}": one for one in outcome.json["checks"]}
    wrong = [name for name, one in checks.items() if one["result"] == "wrong"]
    assert wrong == ["loads/trained parts", "alignment/acceptance"]
    assert "layers.0.hidden_norm.weight (all 1)" in checks["loads/trained parts"]["evidence"]
    assert checks["alignment/acceptance"]["evidence"].startswith("see loads/trained parts: near chance")
    assert outcome.json["verdict"] == "not healthy"
    for name in ("parity/step by step", "parity/training's forward", "loads/head", "config/rope theta"):
        assert checks[name]["result"] == "ok", checks[name]
    assert checks["data/loss mask"]["result"] == "not checked"


def test_a_folder_that_is_not_a_speculator_is_wrong_without_a_traceback(tmp_path: Path, tiny_verifier: Path) -> None:
    """A verifier is not a speculator, and truncated weights are damaged; the other checks are not made."""
    spec = Spec(tmp_path)
    outcome = spec("doctor", tiny_verifier, "--verifier", tiny_verifier, "--suite", "quickstart", "--json")
    assert outcome.code == 1
    checks = {f"{one['family']}/{one['name']}": one for one in outcome.json["checks"]}
    assert "not a speculator" in checks["loads/config.json"]["evidence"]
    folder = untrained(tiny_verifier, tmp_path / "speculator")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    examined = spec("doctor", folder, "--json").json
    assert [one["name"] for one in examined["checks"] if one["result"] == "wrong"] == ["files"]
    assert {one["result"] for one in examined["checks"]} == {"wrong", "not checked"}


def test_data_that_is_not_there_any_more_is_not_checked_by_any_name(tmp_path: Path) -> None:
    """If the run's records, conversations or sources are gone, each promised check says why it was not made."""
    spec = Spec(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": [*PROMPT, ANSWER]}) + "\n" for _ in range(8)))
    values = (f'data.sources=[{{path="{rows}"}}]', "benchmark.suites=[]", "schedule.max_steps=1")
    outcome = spec.run(*(part for value in values for part in ("--set", value)), "--quiet")
    assert outcome.code == 0, outcome.err
    (run,) = spec.runs.iterdir()
    places = Places(cache=spec.cache)

    def checks() -> dict[str, tuple[str, str]]:
        origin, why = TrainingRun.of(run / "speculator")
        speculator: Any = SimpleNamespace(origin=origin, origin_problem=why)
        return {check.name: (check.result, check.evidence) for check in check_data(speculator, places)}

    origin, _ = TrainingRun.of(run / "speculator")
    assert origin is not None
    prepared = conversations_of(origin.lock.fingerprints["prepare"], places)
    assert _stored(origin, prepared).result == "ok"
    (run / "made.json").unlink()
    unknown = _stored(origin, prepared)
    assert (unknown.result, "no made.json" in unknown.evidence) == ("not checked", True)
    shutil.rmtree(prepared.folder)
    assert checks().keys() == {*PROMISED}
    assert {(result, why.partition(":")[0]) for result, why in checks().values()} == {
        ("not checked", "the prepared conversations are gone")
    }
    rows.unlink()
    assert checks().keys() == {*PROMISED}
    assert all("data.sources[0]" in why for _, why in checks().values())
