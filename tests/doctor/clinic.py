"""A tiny speculator with real acceptance in its own run folder, and ways to tamper with copies of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.data.messages import Conversation, Message
from speculators.data.template import ChatTemplate
from speculators.doctor.answers import Answers
from speculators.doctor.check import Check, Diagnosis
from speculators.doctor.run import admit, examine
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.doctor.training import training_model
from speculators.pipeline.measure import SavedSpeculator
from speculators.recipe.schema import Suite
from speculators.runs.places import Places
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.tokens import load_tokenizer

RECIPE = """
format  = 1
name    = "clinic"
version = "1.0.0"

[verifier]
model = "{verifier}"
dtype = "float32"

[data]
sources       = [{{ path = "{data}" }}]
max_tokens    = {max_tokens}
hidden_states = "cached"
states_dtype  = "float32"

[algorithm]
name             = "eagle3"
draft_vocab_size = 256
ttt_steps        = 3
{options}

[schedule]
max_steps        = {steps}
tokens_per_step  = 1024
row_tokens       = 1024
optimizer        = {{ name = "adamw", lr = 5e-3 }}
learning_rate    = {{ shape = "constant", warmup = 0.0 }}
precision        = "fp32"
checkpoint_every = 1000
evaluate_every   = 1000

[benchmark]
suites = []
"""


@attrs.frozen(eq=False)
class Clinic:
    """A healthy run, its cache, its verifier and prompts, and the verifier's answers, made once."""

    run: Path
    cache: Path
    verifier: Path
    prompts: Path
    answers: Answers

    def copy(self, to: Path) -> Path:
        """Copies the run, without its checkpoints, to tamper with."""
        leave_out = shutil.ignore_patterns("checkpoints")
        return Path(shutil.copytree(self.run, to / self.run.name, ignore=leave_out)) / "speculator"

    def alone(self, to: Path) -> Path:
        """Copies the speculator without its run, as if it came from elsewhere."""
        return Path(shutil.copytree(self.run / "speculator", to / "foreign"))

    def examine(self, speculator: Path, *, verifier: Path | None = None, cache: Path | None = None) -> Examined:
        """Examines a speculator on the shared answers."""
        plan = speculator.parent / "plan.json"
        recipe = json.loads(plan.read_text())["recipe"] if plan.is_file() else None
        subject = SavedSpeculator(folder=speculator, recipe=recipe, verifier=str(verifier) if verifier else None)
        suite, places = Suite(name="prompts", path=str(self.prompts)), Places(cache=cache or self.cache)
        return Examined(examine(subject, suite, places=places, answers=self.answers))

    def load(self, speculator: Path) -> ExaminedSpeculator:
        """The speculator, loaded for examination."""
        loaded, _ = admit(SavedSpeculator(folder=speculator, recipe=None, verifier=str(self.verifier)))
        assert loaded is not None
        return loaded


@attrs.frozen
class Examined:
    """A diagnosis, by check."""

    diagnosis: Diagnosis

    def __getitem__(self, name: str) -> Check:
        """The check called "family/check"."""
        checks = {f"{check.family}/{check.name}": check for check in self.diagnosis.checks}
        assert name in checks, f"no check {name}: there are {', '.join(checks)}"
        return checks[name]

    def with_result(self, *results: str) -> list[str]:
        """Names of the checks with one of these results."""
        return [f"{check.family}/{check.name}" for check in self.diagnosis.checks if check.result in results]


def edit(speculator: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes config.json."""
    file = speculator / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def decoder(**values: Any) -> Callable[[Path], None]:
    """Sets values of `transformer_layer_config`."""
    return lambda folder: edit(folder, lambda config: config["transformer_layer_config"].update(values))


def rope(**values: Any) -> Callable[[Path], None]:
    """Sets values of `rope_parameters`."""

    def change(config: dict[str, Any]) -> None:
        config["transformer_layer_config"]["rope_parameters"].update(values)

    return lambda folder: edit(folder, change)


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Changes model.safetensors."""

    def tamper(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)

    return tamper


def training_row(answers: Answers, layer_ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Packs the answers into one training row."""
    last = answers.states((answers.num_layers,))
    items = []
    for row, chosen, final in zip(answers.rows, answers.states(layer_ids), last, strict=True):
        tokens = torch.tensor(row.response.tokens)
        mask = torch.arange(len(tokens)) >= row.response.prompt_length
        items.append((Encoded(tokens.int().numpy(), mask.numpy()), (chosen, final)))
    widths = (items[0][1][0].shape[1], items[0][1][1].shape[1])
    return build_row(items, widths=widths, dtype=torch.float32)


def train_on(clinic: Clinic, speculator: Path, row: dict[str, torch.Tensor], steps: int = 150) -> None:
    """Trains a copy further on one row and exports it."""
    model, kwargs = training_model(clinic.load(speculator))
    torch.manual_seed(0)
    fit(model, kwargs, row, steps)
    model.save_pretrained(speculator)


def fit(model: Any, kwargs: dict[str, Any], row: dict[str, torch.Tensor], steps: int, lr: float = 5e-3) -> None:
    """Overfits one row."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        _, loss, _ = model(**row, **kwargs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


TALKS = {
    "a tree": "It grows slowly, drinks rain, and gives shade to whoever sits below.",
    "the sea": "Salt water without an end, blue by day and black by night.",
    "old books": "They smell of dust; some pages are missing, most words are not.",
    "a town": "Two streets, one church, a market on Monday and many cats.",
    "winter": "Snow covers roofs, children are glad, and cars do not start.",
    "bread": "Flour, water, yeast and an hour of patience make it good.",
    "the moon": "A grey stone far away, that pulls the tides behind itself.",
    "a river": "Born in hills, it turns left, then right, and ends in a lake.",
    "music": "Air that shakes in good order, loud or soft as one likes.",
    "wool": "Sheep wear it first; later we do, in socks and in hats.",
    "glass": "Molten sand, clear when cold, and sharp when it is broken.",
    "a clock": "Two hands walk in circles and never meet for very long.",
    "salt": "White grains from mines or from the sea: soup needs a pinch.",
}


def talk(*subjects: str) -> list[dict[str, str]]:
    """Builds a conversation about some subjects with the verifier's answers."""
    asked = [({"role": "user", "content": f"Tell me about {one}."}, TALKS[one]) for one in subjects]
    return [message for user, answer in asked for message in (user, {"role": "assistant", "content": answer})]


def write_talks(file: Path, conversations: list[list[dict[str, str]]]) -> Path:
    """Writes conversations as JSONL."""
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return file


def long_talks(count: int = 12) -> list[list[dict[str, str]]]:
    """Conversations about three things each, every thing as often as the others."""
    names = list(TALKS)
    return [talk(*(names[(3 * index + 5 * place) % len(names)] for place in range(3))) for index in range(count)]


def make_verifier(folder: Path, seed: int = 0, steps: int = 0) -> Path:
    """A tiny verifier whose final norm multiplies by something else than one: a second norm shows.

    Args:
        steps: updates in which it learns its answers by heart, in any order behind each other: then it writes text.
    """
    make_tiny_verifier(folder, seed=seed, initializer_range=0.1, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.model.norm.weight.copy_(0.5 + torch.rand(32, generator=generator))
    template = ChatTemplate.of(load_tokenizer(folder))
    talks = []
    for subject in TALKS:
        messages = tuple(Message(**message) for message in talk(subject))
        (encoded,) = template.encode(Conversation(subject, "", messages), 256)
        talks.append(torch.from_numpy(encoded.input_ids).long())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        order = torch.randperm(len(talks), generator=generator)
        rows = [torch.cat([talks[i] for i in part])[:256] for part in order.split(4)[:3]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
