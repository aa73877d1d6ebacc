"""The contract of an algorithm: every registered one keeps it, and a class that breaks it gets a precise error."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.contract import build_model, check_contract, trainer_kwargs
from speculators.errors import ContractError, RegistryError
from speculators.facts import VerifierFacts
from speculators.model import MODELS, SpeculatorModel

ALGORITHMS = CONFIGS.names()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_keeps_the_contract(world, name):
    """Both registries have its name; it builds from kwargs alone, and its loss has gradients everywhere."""
    config_class, model_class = SpeculatorModelConfig.get_class(name), SpeculatorModel.get_class(name)
    assert config_class().speculators_model_type == name
    check_contract(model_class, name)
    model, kwargs = world.build(config_class())
    assert isinstance(model.layers, nn.ModuleList)
    output, loss, metrics = model(**world.row(0, 1, layer_ids=world.layer_ids(config_class())), **kwargs)
    loss.backward()
    assert output is not None
    assert float(metrics["loss"]) == float(loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_saves_and_loads(world, name, tmp_path):
    """A saved model loads as the same class with the same tensors."""
    model, _ = world.build(SpeculatorModelConfig.get_class(name)())
    model.save_pretrained(tmp_path)
    loaded = SpeculatorModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for key, tensor in model.saved_names(model.state_dict()).items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_can_be_planned_on_the_meta_device(world, name):
    """Without the verifier's weights the model builds on the meta device, where `spec plan` counts its parameters."""
    config = SpeculatorModelConfig.get_class(name)()
    kwargs = world.kwargs(config)
    with torch.device("meta"):
        model = build_model(
            name, VerifierFacts.read(world.folder / "config.json"), {**kwargs, "verifier_name_or_path": None}
        )
    assert all(parameter.is_meta for parameter in model.parameters())
    # The map to the verifier's vocabulary is where the draft is: it indexes what the draft chose.
    assert model.draft_to_target.is_meta


class Toy(SpeculatorModel):
    """A complete small algorithm; the tests remove parts of it."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    @classmethod
    def from_training_args(cls, verifier_config, **kwargs):
        return cls(None)

    def forward(self, *, hidden_states, **batch):
        loss = self.layers[0](hidden_states).sum()
        return None, loss, {"loss": loss.detach()}


@pytest.fixture
def register(monkeypatch):
    """Registers models for one test only."""
    monkeypatch.setattr(MODELS, "_things", dict(MODELS._things))
    return lambda model_class: MODELS.add("toy", model_class)


FACTS = VerifierFacts({})


def test_a_model_without_layers_is_refused(register):
    """The error names the class, the part and the remedy."""

    class NoLayers(Toy):
        def __init__(self, config):
            SpeculatorModel.__init__(self, config)

    register(NoLayers)
    with pytest.raises(ContractError, match=r"NoLayers has no attribute layers\nself.layers = nn.ModuleList"):
        build_model("toy", FACTS, {})


def test_a_model_without_forward_is_refused():
    """torch's own placeholder does not count as a `forward`."""

    class NoForward(SpeculatorModel):
        @classmethod
        def from_training_args(cls, verifier_config, **kwargs):
            return cls()

    with pytest.raises(ContractError, match=r"NoForward has no forward"):
        check_contract(NoForward, "toy")


def test_a_model_without_from_training_args_is_refused():
    """The base's placeholder does not count as a `from_training_args`."""

    class NoBuild(SpeculatorModel):
        def forward(self, **batch):
            return None

    with pytest.raises(ContractError, match=r"NoBuild has no from_training_args"):
        check_contract(NoBuild, "toy")


def test_kwargs_that_forward_does_not_take_are_named():
    """An argument that get_trainer_kwargs returns and forward lacks is an error."""

    class Strict(Toy):
        def get_trainer_kwargs(**kwargs):
            return {"depth": 3}, {}

        get_trainer_kwargs = staticmethod(get_trainer_kwargs)

        def forward(self, *, hidden_states, input_ids):
            return None

    with pytest.raises(ContractError, match=r"Strict.forward does not take depth"):
        trainer_kwargs(Strict(None), {})


def test_get_trainer_kwargs_must_be_a_pair():
    """Anything but two dicts is an error."""

    class Single(Toy):
        @classmethod
        def get_trainer_kwargs(cls, **kwargs):
            return {}

    with pytest.raises(ContractError, match=r"must return \(train_kwargs, val_kwargs\)"):
        trainer_kwargs(Single(None), {})


def test_a_name_is_registered_once(register):
    """Two classes under one name are an error that names both."""
    register(Toy)

    class Other(Toy):
        pass

    with pytest.raises(RegistryError, match=r"registered twice: .*Toy and .*Other"):
        register(Other)


def test_a_config_registers_under_its_own_type():
    """A name that differs from speculators_model_type is an error that names both."""
    with pytest.raises(RegistryError, match=r"registered as 'one' but its speculators_model_type is 'two'"):

        @SpeculatorModelConfig.register("one")
        class Config(SpeculatorModelConfig):
            speculators_model_type: str = "two"


def test_every_config_field_needs_a_default():
    """A field without a default could not be left out of a recipe."""
    with pytest.raises(RegistryError, match=r"no default for size"):

        @SpeculatorModelConfig.register("nodefault")
        @attrs.frozen(kw_only=True, slots=False)
        class Config(SpeculatorModelConfig):
            speculators_model_type: str = "nodefault"
            size: int = attrs.field()


def test_a_missing_hook_says_what_it_must_return():
    """The defaults of `replay` and `draft` name the missing hook and its return value."""
    with pytest.raises(ContractError, match=r"Toy has no replay; it must return an iterator over K depths"):
        Toy(None).replay(
            hidden_states=None, input_ids=None, position_ids=None, document_ids=None, num_speculative_tokens=1
        )
    with pytest.raises(ContractError, match=r"Toy has no draft; it must return a Drafter"):
        Toy(None).draft()
