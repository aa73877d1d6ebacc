"""An audit passes a server of the run's own speculator, and names what is wrong with three sabotaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from decoding_server import DecodingServer
from fake_server import served
from sabotage import SABOTAGES

from speculators.bench.suites import load_suite
from speculators.config import ProposalConfig, SpeculatorsConfig, VerifierConfig
from speculators.contract import build_model
from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.data.template import ChatTemplate
from speculators.facts import VerifierFacts
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.pipeline.audit import LEFT, audit_endpoint
from speculators.pipeline.measure import SavedSpeculator
from speculators.recipe.decoder import draft_decoder_config
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.servers.audit import AuditResult
from speculators.servers.endpoint import Endpoint
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

SUBJECTS = ("a tree", "old books", "winter", "bread", "the moon", "a river")
LAYERS, DRAFT_VOCAB, TOKENS = (1, 2, 3), 128, 32


@attrs.frozen
class Subject:
    """A speculator that has learnt its verifier's answers to a suite by heart."""

    engine: Engine
    suite: Suite
    folder: Path

    def audit(self, served_folder: Path, **changes: Any) -> AuditResult:
        """Audits a server of another folder against this speculator."""
        section = BenchmarkSection(suites=(self.suite,), max_new_tokens=TOKENS)
        saved = SavedSpeculator(folder=self.folder, recipe=None, verifier=str(self.engine.folder))
        with served(DecodingServer(verifier=self.engine, speculator=served_folder, **changes)) as fake:
            return audit_endpoint(
                saved, section, engine="vllm", endpoint=Endpoint(url=fake.url), progress=lambda event: None
            )


def _training_kwargs(engine: Engine, config: Eagle3SpeculatorConfig, tokens: set[int]) -> dict[str, Any]:
    seen = sorted(tokens)
    ids = torch.tensor([*seen, *(token for token in range(320) if token not in tokens)][:DRAFT_VOCAB]).sort().values
    own = {field.name: getattr(config, field.name) for field in type(config).recipe_fields()}
    return {
        **own,
        "verifier_name_or_path": str(engine.folder),
        "target_layer_ids": LAYERS,
        "draft_vocab_size": DRAFT_VOCAB,
        "transformer_layer_config": draft_decoder_config(engine.facts, config),
        "speculators_config": SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=(ProposalConfig(),),
            verifier=VerifierConfig(name_or_path=str(engine.folder), architectures=("LlamaForCausalLM",)),
        ),
        "t2d": torch.zeros(320, dtype=torch.bool).index_fill_(0, ids, True),
        "d2t": ids - torch.arange(DRAFT_VOCAB),
        "dtype": "float32",
        "seed": 0,
    }


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    """A verifier whose random weights are large enough to write more than one token over and over."""
    work = tmp_path_factory.mktemp("audit")
    engine = Engine(make_tiny_verifier(work / "v", initializer_range=0.2, max_position_embeddings=256), dtype="float32")
    rows = [{"question_id": index, "turns": [f"Tell me about {one}."]} for index, one in enumerate(SUBJECTS)]
    rows[0]["turns"] = [*rows[0]["turns"], "And then?"]
    path = work / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    suite = Suite(name="mine", path=str(path))
    template = ChatTemplate.of(engine.tokenizer)
    prompts = [prompt.ids(template) for prompt in load_suite(suite)]
    answers = engine.generate(prompts, max_new_tokens=TOKENS)
    items = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor(prompt + answer)
        mask = torch.arange(len(tokens)) >= len(prompt)
        items.append((Encoded(tokens.int().numpy(), mask.numpy()), engine.capture([tokens], LAYERS)[0]))
    row = build_row(items, widths=(32 * len(LAYERS), 32), dtype=torch.float32)
    kwargs = _training_kwargs(engine, Eagle3SpeculatorConfig(loss={"ce": 1.0}), {t for each in answers for t in each})
    torch.manual_seed(0)
    model = build_model("eagle3", VerifierFacts.read(engine.folder / "config.json"), kwargs)
    given, _ = model.get_trainer_kwargs(**kwargs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(80):
        _, loss, _ = model(**row, **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(work / "speculator")
    return Subject(engine, suite, work / "speculator")


@pytest.mark.parametrize("details", [True, False])
def test_a_server_of_the_same_speculator_passes(subject, details, monkeypatch):
    """Every round of our live decode is as replay predicts, by the server's report as by its chunks."""
    monkeypatch.setattr("speculators.servers.counters.SETTLE_SECONDS", 0.01)
    result = subject.audit(subject.folder, details=details)
    assert result.passes
    assert (result.differing, result.patterns, result.explanations) == ((), (), ())
    assert (result.tally.answers, result.tally.foreign_tokens) == (7, 0)
    # Else the sabotaged ones would prove nothing.
    assert result.tally.served_tau == result.tally.predicted_tau > 1.5


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_sabotaged_speculator_is_named(subject, sabotage, tmp_path):
    """The tokens are right, the rounds differ beyond near ties, and the sabotage alone explains all of them."""
    spoilt = Path(shutil.copytree(subject.folder, tmp_path / "spoilt"))
    finding = sabotage(spoilt)
    result = subject.audit(spoilt)
    assert not result.passes
    assert (result.tally.foreign_tokens, result.tally.answers) == (0, 7)
    first = result.differing[0]
    assert first.draft_gap is None or first.draft_gap > 0.001
    best, *others = result.explanations
    assert (best.what, best.explains) == (finding, True)
    assert result.tally.rounds - best.agreeing <= LEFT * len(result.differing)
    assert not any(other.explains for other in others)
