"""A packed row of real states of the tiny verifier, and the EAGLE-3 models that train on it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch

from speculators.config import ProposalConfig, SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.contract import build_model
from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.facts import VerifierFacts
from speculators.init_from import start_model
from speculators.recipe.decoder import draft_decoder_config
from speculators.verifier.engine import Engine

LAYER_IDS = (1, 2, 4)


@attrs.frozen(eq=False)
class World:
    """The tiny verifier, greedy responses of its own, and their states."""

    folder: Path
    engine: Engine
    prompts: list[list[int]]
    answers: list[list[int]]

    def layer_ids(self, config) -> tuple[int, ...]:
        """The states that an algorithm reads: its own choice if it has one, else three of the four layers."""
        own = type(config).layer_ids is not SpeculatorModelConfig.layer_ids
        return config.layer_ids(self.engine.num_layers) if own else LAYER_IDS

    def row(self, *which: int, layer_ids: tuple[int, ...] = LAYER_IDS) -> dict[str, torch.Tensor]:
        """A packed row of some of the conversations, answers supervised."""
        items = []
        for index in which:
            tokens = torch.tensor(self.prompts[index] + self.answers[index])
            mask = torch.arange(len(tokens)) >= len(self.prompts[index])
            states = self.engine.capture([tokens], layer_ids)[0]
            items.append((Encoded(tokens.int().numpy(), mask.numpy()), states))
        return build_row(items, widths=(32 * len(layer_ids), 32), dtype=torch.float32)

    def kwargs(self, config, draft_vocab_size: int | None = None) -> dict:
        """Training kwargs of an algorithm's config, as the pipeline builds them."""
        facts = VerifierFacts.read(self.folder / "config.json")
        size = facts.vocab_size
        t2d = d2t = None
        if draft_vocab_size:
            seen = torch.tensor(sorted({t for answer in self.answers for t in answer}))
            rest = torch.tensor([t for t in range(size) if t not in set(seen.tolist())])
            ids = torch.cat([seen, rest])[:draft_vocab_size].sort().values
            t2d = torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True)
            d2t = ids - torch.arange(len(ids))
        own = {field.name: getattr(config, field.name) for field in type(config).recipe_fields()}
        return {
            **own,
            "verifier_name_or_path": str(self.folder),
            "target_layer_ids": self.layer_ids(config),
            "draft_vocab_size": draft_vocab_size or size,
            "transformer_layer_config": draft_decoder_config(facts, config),
            "speculators_config": SpeculatorsConfig(
                algorithm=config.speculators_model_type,
                proposal_methods=(ProposalConfig(),),
                verifier=VerifierConfig(name_or_path=str(self.folder), architectures=("LlamaForCausalLM",)),
            ),
            "t2d": t2d,
            "d2t": d2t,
            "dtype": "float32",
            "seed": 0,
        }

    def start(self, config, draft_vocab_size: int | None = None):
        """The model as training starts with it, from `init_from` where the config has one."""
        torch.manual_seed(0)
        facts = VerifierFacts.read(self.folder / "config.json")
        return start_model(config.speculators_model_type, facts, self.kwargs(config, draft_vocab_size))

    def build(self, config, draft_vocab_size: int | None = None):
        """The model, and what its forward is given besides the row."""
        torch.manual_seed(0)
        kwargs = self.kwargs(config, draft_vocab_size)
        model = build_model(config.speculators_model_type, VerifierFacts.read(self.folder / "config.json"), kwargs)
        return model, model.get_trainer_kwargs(**kwargs)[0]


@pytest.fixture(scope="session")
def world(tiny_verifier) -> World:
    """The tiny verifier with eight greedy conversations of its own."""
    engine = Engine(tiny_verifier, dtype="float32")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 250, (int(n),), generator=generator).tolist() for n in (6, 9, 12, 5, 8, 15, 7, 10)]
    answers = engine.generate(prompts, max_new_tokens=24)
    return World(tiny_verifier, engine, prompts, answers)
