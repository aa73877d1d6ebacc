"""An algorithm written by following the guide, in a folder outside the package, works."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import pytest
import torch
from command import Spec
from safetensors.torch import load_file

from speculators import SpeculatorModel, SpeculatorModelConfig

INIT = """\
from {name}.config import MyAlgoSpeculatorConfig
from {name}.core import MyAlgoDraftModel

__all__ = ["MyAlgoDraftModel", "MyAlgoSpeculatorConfig"]
"""

CONFIG = """\
from speculators import SpeculatorModelConfig


@SpeculatorModelConfig.register("{name}")
class MyAlgoSpeculatorConfig(SpeculatorModelConfig):
    speculators_model_type: str = "{name}"
    block_size: int = 8
    num_layers: int = 1
"""

HEAD = """\
import torch
from torch import nn

from speculators import SpeculatorModel

from {name}.config import MyAlgoSpeculatorConfig


@SpeculatorModel.register("{name}")
class MyAlgoDraftModel(SpeculatorModel):
"""

# This class is built from its config alone; `get_trainer_kwargs` is a static method.
BY_CONFIG = """\
    def __init__(self, config):
        super().__init__(config)
        size = config.transformer_layer_config["hidden_size"]
        self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(config.block_size)])
        self.head = nn.Linear(size, config.draft_vocab_size)

    @classmethod
    def from_training_args(cls, verifier_config, **kwargs):
        return cls(MyAlgoSpeculatorConfig.pick(kwargs))

    @staticmethod
    def get_trainer_kwargs(**kwargs):
        return {"scale": 1.0 / kwargs["block_size"]}, {"scale": 1.0}
"""

# Built from arguments of its own, the draft vocabulary's tensors among them; `get_trainer_kwargs` is a class method.
BY_ARGUMENTS = """\
    def __init__(self, size, t2d, *, depth):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(depth)])
        self.head = nn.Linear(size, len(t2d.nonzero()))
        self.register_buffer("t2d", t2d)

    @classmethod
    def from_training_args(cls, verifier_config, **kwargs):
        assert len(kwargs["d2t"]) == kwargs["draft_vocab_size"]
        return cls(verifier_config.hidden_size, kwargs["t2d"], depth=kwargs["block_size"])

    @classmethod
    def get_trainer_kwargs(cls, **kwargs):
        return {"scale": 1.0 / kwargs["block_size"]}, {"scale": 1.0}
"""

FORWARD = """\
    def forward(self, hidden_states, input_ids, loss_mask, scale, **kwargs):
        state = hidden_states[0, :, : self.head.in_features].float()
        for layer in self.layers:
            state = state + scale * torch.tanh(layer(state))
        logits = self.head(state)
        wanted = input_ids[0] % logits.shape[-1]
        losses = nn.functional.cross_entropy(logits[:-1], wanted[1:], reduction="none")
        mask = loss_mask[0, 1:]
        loss = (losses * mask).sum() / loss_mask.sum().clamp_min(1)
        return logits, loss, {"loss": loss.detach()}
"""

RECIPE = """\
format = 1
name = "mine"
version = "1.0.0"
extends = "smoke"
[algorithm]
name = "{name}"
module = "{name}"
draft_vocab_size = 128
block_size = 2
"""


@pytest.fixture(params=[("myalgo", BY_CONFIG), ("myalgo_by_arguments", BY_ARGUMENTS)], ids=lambda param: param[0])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Path:
    """A recipe beside a package that is not on the import path."""
    name, build = request.param
    folder = tmp_path_factory.mktemp(name)
    (folder / name).mkdir()
    files = {"__init__.py": INIT, "config.py": CONFIG, "core.py": HEAD}
    for file, text in files.items():
        (folder / name / file).write_text(text.format(name=name))
    with (folder / name / "core.py").open("a") as core:
        core.write(build + "\n" + FORWARD)
    (folder / "mine.toml").write_text(RECIPE.format(name=name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    return folder / "mine.toml"


def test_an_external_algorithm_trains_saves_and_loads(spec: Spec, smoke: object, recipe: Path, tmp_path: Path) -> None:
    """`spec plan`, `run` and a second `run` work; a warning names the hooks that measuring would need."""
    runs = ("--runs", tmp_path / "runs")
    plan = spec("plan", recipe, *runs, "--json")
    assert plan.code == 0, plan.err
    outcome = spec("run", recipe, *runs, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["bench"] is None
    name = plan.json["recipe"]["algorithm"]["name"]
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2
    assert all(f"{name} has no replay and no draft" in line for line in warnings)
    assert "bench is left out" in warnings[1]
    assert "exported the last of 8 updates" in outcome.err

    assert SpeculatorModel.get_class(name).__qualname__ == "MyAlgoDraftModel"
    config_class = SpeculatorModelConfig.get_class(name)
    # `register` made an attrs class of the bare one: its annotated fields are keys of a recipe.
    assert {field.name for field in attrs.fields(config_class)} >= {"block_size", "num_layers", "draft_vocab_size"}
    assert (config_class().block_size, config_class().num_layers) == (8, 1)

    folder = Path(outcome.json["run"])
    model = SpeculatorModel.from_pretrained(folder / "speculator")
    assert type(model) is SpeculatorModel.get_class(name)
    assert model.config.block_size == len(model.layers) == 2
    saved = load_file(folder / "speculator" / "model.safetensors")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[key], rtol=0, atol=0)
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert f"{trained:,} trainable parameters" in outcome.err

    again = spec("run", recipe, *runs)
    assert again.code == 0, again.err
    assert "train already done" in again.err


def test_bench_says_which_hook_is_missing_and_what_it_must_return(
    spec: Spec, smoke: object, recipe: Path, tmp_path: Path
) -> None:
    """The run ends with a clear error instead of a number."""
    outcome = spec("run", recipe, "--runs", tmp_path / "runs", "--set", "schedule.max_steps=1", "--json")
    failed = spec("bench", outcome.json["run"])
    assert failed.code == 1
    assert "has no draft; it must return a Drafter" in failed.err
    assert "Traceback" not in failed.err
