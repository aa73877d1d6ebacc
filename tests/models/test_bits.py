"""Training is reproducible to the bit: the same rows with the same number of threads give the same gradients."""

from __future__ import annotations

import attrs
import pytest
import torch

from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.facts import VerifierFacts
from speculators.models.base_components import Shape
from speculators.models.mtp.layers import MixtureOfExperts
from speculators.recipe.decoder import draft_decoder_config
from speculators.training.rng import seed_row
from speculators.verifier.tiny import make_tiny_verifier

from .conftest import World
from .test_mtp import EXPERTS

# Wide and long enough that torch's kernels share the work among threads (they do from 32,768 elements on), where a
# sum made with atomics would come out in another order each time.
WIDTH, TOKENS, DOCUMENTS = 128, 320, 4
REPEATS = 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> World:
    """A verifier of another width; its weights and the states below are random."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 256, "head_dim": 32}
    folder = make_tiny_verifier(tmp_path_factory.mktemp("wide") / "verifier", vocab_size=1024, **shape)
    facts = VerifierFacts.read(folder / "config.json")
    engine = attrs.make_class("Engine", ["num_layers"])(facts.num_hidden_layers)
    return World(folder, engine, [[0]], [[1]])


@pytest.fixture
def _threads():
    """Two threads whatever the machine: with one there is nothing to come out otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_row(config, world: World) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(TOKENS // DOCUMENTS).repeat(DOCUMENTS)
    states = torch.randn(1, TOKENS, len(world.layer_ids(config)) * WIDTH, generator=generator)
    return {
        "hidden_states": states,
        "verifier_last_hidden_states": torch.randn(1, TOKENS, WIDTH, generator=generator),
        # Few tokens, so that many places would add to one row of an embedding's gradient.
        "input_ids": torch.randint(16, (1, TOKENS), generator=generator),
        "loss_mask": (positions >= 8)[None],
        "position_ids": positions[None],
        "document_ids": torch.arange(DOCUMENTS).repeat_interleave(TOKENS // DOCUMENTS)[None],
    }


@pytest.mark.slow  # two threads on a machine with less than two cores to spare wait for each other
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", CONFIGS.names())
def test_loss_and_gradients_are_the_same_bits_each_time(wide, name):
    """Rows large enough to be shared by threads, what is drawn seeded as the loop does it: not one bit differs."""
    config = SpeculatorModelConfig.get_class(name)()
    model, kwargs = wide.build(config)
    row = random_row(config, wide)
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def once() -> dict[str, torch.Tensor]:
        seed_row(0, 1, 0)
        _, loss, _ = model(**row, **kwargs)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found = {key: grad for key, grad in zip(named, grads, strict=True) if grad is not None}
        return {"loss": loss.detach(), **found}

    first = once()
    for _ in range(REPEATS - 1):
        again = once()
        assert [key for key in first if not torch.equal(first[key], again[key])] == []


@pytest.mark.slow
@pytest.mark.usefixtures("_threads")
def test_a_mixture_of_experts_has_the_same_bits_each_time(wide):
    """A row goes to several experts: their outputs, and the gradients that come back, add up in one order."""
    torch.manual_seed(0)
    decoder = draft_decoder_config(VerifierFacts.read(wide.folder / "config.json"), SpeculatorModelConfig())
    layer = MixtureOfExperts({**decoder, **EXPERTS}, Shape.of(decoder))
    x = torch.randn(4 * TOKENS, WIDTH, requires_grad=True)
    asked = [x, *layer.parameters()]

    def once() -> list[torch.Tensor]:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), asked)]

    first = once()
    for _ in range(10):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, once(), strict=True))
