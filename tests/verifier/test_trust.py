"""A verifier with code of its own runs if, and only if, the recipe trusts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from speculators.cost.sizes import verifier_cost
from speculators.errors import VerifierError
from speculators.facts import VerifierFacts
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier.engine import Engine
from speculators.verifier.sources import fetch_facts, obtain
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.weights import load_head

CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_{name}"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose folder says that its classes are in files beside it."""
    # transformers copies the code there.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_tiny_verifier(tmp_path / f"own_{tmp_path.name}")
    file = folder / "config.json"
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {**json.loads(file.read_text()), "model_type": f"own_{tmp_path.name}", "auto_map": code}
    file.write_text(json.dumps({**config, "architectures": ["OwnForCausalLM"]}))
    (folder / "configuration_own.py").write_text(CONFIG.replace("{name}", tmp_path.name))
    (folder / "modeling_own.py").write_text(MODEL)
    return folder


def test_trusted_code_is_captured_from_and_its_head_is_read(folder: Path) -> None:
    """With verifier.trust_remote_code = true the model, its head, its costs and its sizes come from its own classes."""
    section = VerifierSection(model=str(folder), trust_remote_code=True)
    facts = fetch_facts(section)
    assert obtain(section) == folder
    engine = Engine(folder, section=section)
    assert type(engine.model).__name__ == "OwnForCausalLM"
    engine.check_head(load_head(folder, facts))
    ((_, last),) = engine.capture([torch.arange(5)], (1,))
    assert last.shape == (5, 32)
    assert verifier_cost(facts).parameters == sum(p.numel() for p in engine.model.parameters())


def test_code_that_is_not_trusted_does_not_run(folder: Path) -> None:
    """Without it, model and head are refused, the code is not imported, and the error names the key to set."""
    (folder / "configuration_own.py").write_text("raise SystemExit('the code ran')")
    section = VerifierSection(model=str(folder))
    facts = fetch_facts(section)
    for use in (lambda: Engine(folder), lambda: load_head(folder, facts), lambda: verifier_cost(facts)):
        with pytest.raises(VerifierError, match=r"does not know the model_type.*\n.*verifier.trust_remote_code = true"):
            use()


def test_code_that_fails_is_an_error_in_a_line(folder: Path) -> None:
    """A trusted file that raises is reported with the verifier's config.json, not as a traceback."""
    (folder / "configuration_own.py").write_text("raise ImportError('needs flash_attn')")
    section = VerifierSection(model=str(folder), trust_remote_code=True)
    facts = fetch_facts(section)
    with pytest.raises(VerifierError, match=r"config.json: the model's own code rejects it: needs flash_attn"):
        load_head(folder, facts)


def test_sizes_that_a_file_states_are_read_without_its_code(folder: Path) -> None:
    """A plan of a model with its own code needs only what the file says."""
    assert VerifierFacts.read(folder / "config.json").head_dim == 8
