"""Checkpoints go both ways between here and vllm-project/speculators, and both sides compute the same.

A model with random weights (norms and zero-initialised heads, too) is built here, saved, loaded by upstream and run
through upstream's training forward on a conversation of the tiny verifier; logits must be ours within 1e-4, and the
checkpoint that upstream saves must load here with the same logits. Where upstream draws at random (anchors, elements)
it is given all that there are.

Losses agree once two differences of definition are taken out (ours is held to be right: a loss mask is by predicted
token): upstream's data masks a place by the token that it *reads*, ours by the token that it *predicts*; and upstream
divides by the number of drafts, ours by the number of supervised tokens (and, in blocks, by the sum of the decay), so
that the loss does not depend on how many were drawn.
"""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import pytest
import torch
from foreign import upstream
from models.conftest import World
from safetensors.torch import load_file, save_file

from speculators.config import SpeculatorModelConfig
from speculators.model import SpeculatorModel
from speculators.nn.layout import PackedRow
from speculators.verifier.engine import Engine

pytestmark = pytest.mark.interop

TOLERANCE = 1e-4
DEPTHS, BLOCK = 3, 4
GAMMA = 2.0


@pytest.fixture(scope="module")
def world(tiny_verifier):
    """The tiny verifier with conversations of its own."""
    engine = Engine(tiny_verifier, dtype="float32")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (9, 12)]
    return World(tiny_verifier, engine, prompts, engine.generate(prompts, max_new_tokens=24))


@attrs.frozen(eq=False)
class Case:
    """A model of ours, a row, and where upstream's files are."""

    model: SpeculatorModel
    kwargs: dict
    row: dict
    verifier: Path
    work: Path

    @property
    def theirs(self):
        return self.work / "theirs"

    @property
    def length(self):
        return self.row["input_ids"].shape[1]

    def ask(self, batch, *, loss, places=None, **arguments):
        """Runs upstream's forward on a batch; returns its logits and its answer."""
        path, logits = self.work / "batch.safetensors", self.work / "logits.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, path)
        request = {"folder": str(self.work / "ours"), "batch": str(path), "arguments": arguments, "loss": loss}
        request |= {"places": places or {}, "save": str(self.theirs), "logits": str(logits)}
        answer = upstream().call("run_upstream.py", request, self.work)
        assert answer["unknown"] == answer["changed"] == []
        tensors = load_file(logits)
        return [tensors[str(depth)] for depth in range(len(tensors))], answer

    def replay(self, model=None, depths=DEPTHS):
        names = ("hidden_states", "input_ids", "position_ids", "document_ids")
        arguments = {name: self.row[name] for name in names}
        return list((model or self.model).replay(**arguments, num_speculative_tokens=depths))

    def again(self, depths=DEPTHS):
        """Computes our logits from the checkpoint that upstream saved."""
        return self.replay(SpeculatorModel.from_pretrained(self.theirs, verifier=self.verifier), depths)


@pytest.fixture
def case(world, tmp_path):
    """Builds a case of an algorithm: random weights, and one conversation whose last positions are not supervised."""

    def make(name, draft_vocab_size=128, **options):
        config = SpeculatorModelConfig.get_class(name)(**options)
        model, kwargs = world.build(config, draft_vocab_size)
        torch.manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.data.uniform_(0.5, 1.5)
            elif parameter.requires_grad:
                parameter.data.normal_(std=0.15)
        model.save_pretrained(tmp_path / "ours")
        row = {name: tensor for name, tensor in world.row(0).items() if isinstance(tensor, torch.Tensor)}
        # Blocks reach beyond the last place that they draft; upstream has no place there.
        row["loss_mask"] = row["loss_mask"].clone()
        row["loss_mask"][:, -BLOCK:] = False
        return Case(model, kwargs, row, world.folder, tmp_path)

    return make


def _shifted(row, mask):
    """Makes a row as upstream's EAGLE-like models take it: each token is paired with the state before it; `mask` is
    theirs."""
    return {
        "hidden_states": row["hidden_states"][:, :-1],
        "input_ids": row["input_ids"][:, 1:],
        "verifier_last_hidden_states": row["verifier_last_hidden_states"][:, 1:],
        "loss_mask": mask,
        "position_ids": row["position_ids"][:, 1:],
        "document_ids": row["document_ids"][:, 1:],
    }


def _by_prediction(mask, places):
    """Makes our mask for a row whose entry i predicts the token `places` further on."""
    return torch.cat((mask[:, places:], torch.zeros_like(mask[:, :places])), dim=1)


def _ours(case, **changes):
    torch.manual_seed(0)
    with torch.no_grad():
        _, loss, _ = case.model(**{**case.row, **changes}, **case.kwargs)
    return float(loss)


@pytest.mark.parametrize(
    ("draft_vocab_size", "options"),
    [
        (128, {}),
        (None, {"norm_before_residual": False}),
        (128, {"norm_before_fc": True, "decoder": {"model_type": "qwen3"}}),
        (128, {"fc_norm": True, "norm_output": True, "num_layers": 2}),
    ],
)
def test_eagle3(case, draft_vocab_size, options):
    """Every depth of the unroll agrees; upstream's own mask gives another loss."""
    made = case("eagle3", draft_vocab_size, ttt_steps=DEPTHS, **options)
    mask = _by_prediction(made.row["loss_mask"], 2)[:, :-1]
    arguments = {"loss": "kl_div", "ttt_steps": DEPTHS}
    theirs, answer = made.ask(_shifted(made.row, mask), **arguments)
    assert len(theirs) == DEPTHS
    for ours in (made.replay(), made.again()):
        for depth, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            rows = made.length - 1 - depth  # later ones read past the end
            assert torch.allclose(own[:rows], other[:rows], atol=TOLERANCE)
    assert _ours(made) == pytest.approx(answer["loss"], abs=TOLERANCE)
    _, naive = made.ask(_shifted(made.row, made.row["loss_mask"][:, 1:]), **arguments)
    assert abs(naive["loss"] - _ours(made)) > 1e-3
    assert _ours(made, loss_mask=made.row["loss_mask"].roll(1, 1)) == pytest.approx(naive["loss"], abs=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"norm_before_residual": True, "norm_before_fc": True, "num_layers": 2}])
def test_peagle(case, options):
    """All elements of all depths agree in one forward."""
    every = {"keep": 1.0, "keep_min": 1.0, "max_anchors": 10**6}
    made = case("peagle", num_depths=DEPTHS, **every, **options)
    rows = made.length - 1
    pairs = [(row, depth) for depth in range(DEPTHS) for row in range(rows - depth)]
    places = {"anchors": [row for row, _ in pairs], "depths": [depth for _, depth in pairs]}
    mask = _by_prediction(made.row["loss_mask"], 2)[:, :-1]
    (theirs,), answer = made.ask(_shifted(made.row, mask), loss="kl_div", places=places, num_depths=DEPTHS)
    for ours in (made.replay(), made.again()):
        own = torch.stack([ours[depth][row] for row, depth in pairs])
        assert torch.allclose(own, theirs, atol=TOLERANCE)
    drafts = sum(bool(mask[0, row + depth]) for row, depth in pairs)
    supervised = int(made.row["loss_mask"].sum())
    assert _ours(made) * supervised == pytest.approx(answer["loss"] * drafts, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "draft_vocab_size", "options"),
    [
        ("dflash", 128, {"weights": "exponential"}),
        ("dflash", None, {"weights": "exponential"}),
        ("dspark", 128, {}),
        ("dspark", 128, {"markov_head_type": "gated", "confidence_head_with_markov": True}),
        ("dspark", 128, {"markov_head_type": "rnn"}),
    ],
)
def test_blocks(case, name, draft_vocab_size, options):
    """Blocks at all anchors agree; with a Markov head, so do the logits that see the previous token."""
    if name == "dspark":
        options = {**options, "markov_rank": 16}
    made = case(name, draft_vocab_size, num_layers=2, block_size=BLOCK, max_anchors=10**6, gamma=GAMMA, **options)
    model, mask = made.model, made.row["loss_mask"]
    torch.manual_seed(0)
    packed = PackedRow.of(**made.row)
    fused, last = packed.cut(made.row["hidden_states"]), packed.cut(made.row["verifier_last_hidden_states"])
    drawn = model.draw(packed, fused, last, max_anchors=10**6)
    anchors = [int(row) + 1 for row in drawn.anchors]
    theirs_mask = _by_prediction(mask, 1) if model.config.sample_from_anchor else mask
    batch = {key: made.row[key] for key in made.row if key != "loss_mask"} | {"loss_mask": theirs_mask}
    loss = '{"ce": 0.1, "tv": 0.9}' if name == "dspark" else "ce"
    arguments = {"loss": loss, "places": {"anchors": anchors}, "gamma": GAMMA, "max_anchors": len(anchors)}
    (theirs,), answer = made.ask(batch, **arguments)
    blocks = theirs.unflatten(0, (len(anchors), BLOCK))[:, model.first_slot :]
    for ours in (made.replay(depths=model.depths), made.again(model.depths)):
        own = torch.stack([logits[drawn.anchors] for logits in ours], dim=1)
        assert torch.allclose(own, blocks, atol=TOLERANCE)
    decay = sum(math.exp(-depth / GAMMA) for depth in range(model.depths))
    ours_sum = _ours(made) * decay * int(mask.sum())
    assert ours_sum == pytest.approx(answer["loss"] * len(drawn.depth), rel=TOLERANCE)
