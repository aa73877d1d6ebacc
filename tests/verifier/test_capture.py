"""Capturing hidden states from the verifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speculators.errors import VerifierError
from speculators.verifier.capture import batches_by_length, batches_in_order
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

LENGTHS = (5, 17, 1, 40, 17)


@pytest.fixture(scope="module")
def engine(tiny_verifier: Path) -> Engine:
    return Engine(tiny_verifier)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(320, (length,), generator=generator) for length in LENGTHS]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Computes the largest difference relative to the state's root mean square: the last layers reach magnitudes of
    hundreds."""
    return float((a - b).abs().max() / b.float().square().mean().sqrt())


def test_ids_mean_the_stream_entering_a_layer(engine: Engine, rows: list[torch.Tensor]):
    """Id l is Hugging Face's hidden_states[l] for l < N; id N is the last layer's output before the final norm."""
    with torch.no_grad():
        theirs = engine.model(rows[1][None], output_hidden_states=True).hidden_states
    ((states, last),) = engine.capture([rows[1]], (0, 2, 3, 4))
    for place, layer_id in enumerate((0, 2, 3)):
        assert torch.equal(states[:, 32 * place : 32 * place + 32], theirs[layer_id][0])
    assert torch.equal(states[:, 96:], last)
    # Hugging Face's own last entry is taken after the norm.
    assert torch.equal(engine.model.get_decoder().norm(last), theirs[4][0])


# float32: only the order of sums differs with the batch's shape. bfloat16: 8 bits a number, several roundings deep.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_batch_results_equal_single_results(
    tmp_path: Path, rows: list[torch.Tensor], model_type: str, dtype: str, tolerance: float
):
    """Neither other rows of the batch, nor padding, nor a second call changes a result."""
    sliding = {"sliding_window": 8} if model_type == "gemma2" else {}
    engine = Engine(make_tiny_verifier(tmp_path, model_type=model_type, **sliding), dtype=dtype)
    together = engine.capture(rows, (1, 3))
    again = engine.capture(rows, (1, 3))
    for row, (states, last), (states_again, _) in zip(rows, together, again, strict=True):
        ((alone, last_alone),) = engine.capture([row], (1, 3))
        assert states.shape == (len(row), 64)
        assert last.shape == (len(row), 32)
        assert states.dtype == engine.dtype
        assert relative(states, alone) < tolerance
        assert relative(last, last_alone) < tolerance
        assert torch.equal(states, states_again)


def test_capture_all_gives_every_row_once(engine: Engine, rows: list[torch.Tensor]):
    """Rows come in batches by length, each with its own index and its own states, the same as alone."""
    captured = list(engine.capture_all(rows, (1,), batch_tokens=40))
    assert sorted(index for index, _, _ in captured) == list(range(len(rows)))
    for index, states, last in captured:
        ((alone, last_alone),) = engine.capture([rows[index]], (1,))
        assert relative(states, alone) < 1e-5
        assert relative(last, last_alone) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_packed_row_gives_single_results_without_padding(
    tmp_path: Path, rows: list[torch.Tensor], model_type: str, dtype: str, tolerance: float
):
    """Sequences of any lengths lie side by side in one forward, and each has the states that it has alone."""
    sliding = {"sliding_window": 8} if model_type == "gemma2" else {}
    engine = Engine(make_tiny_verifier(tmp_path, model_type=model_type, **sliding), dtype=dtype)
    assert engine.keeps_apart
    shapes: list[torch.Size] = []
    engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    captured = list(engine.capture_packed(rows, (1, 3)))
    assert shapes == [(1, sum(LENGTHS))]
    assert [index for index, _, _ in captured] == list(range(len(rows)))
    for row, (_, states, last) in zip(rows, captured, strict=True):
        ((alone, last_alone),) = engine.capture([row], (1, 3))
        assert relative(states, alone) < tolerance
        assert relative(last, last_alone) < tolerance


def test_packed_batches_keep_to_the_token_budget():
    """A longer sequence is a batch by itself."""
    assert batches_in_order([10, 300, 20, 20, 90, 10], 100) == [(0,), (1,), (2, 3), (4, 5)]
    assert batches_in_order([], 100) == []


def test_batches_keep_to_the_token_budget():
    """Padded to its longest, no batch exceeds the budget, except a row that does so alone; similar lengths meet."""
    lengths = [10, 300, 20, 20, 90, 10]
    batches = batches_by_length(lengths, 100)
    assert batches == [(0, 5, 2, 3), (4,), (1,)]
    assert batches_by_length([], 100) == []


def test_the_head_never_runs(engine: Engine, rows: list[torch.Tensor]):
    """States need no logits; the chosen ones alone are those that come with the last ones."""
    ran: list[str] = []
    handle = engine.model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    ((chosen, _),) = engine.capture(rows[:1], (0, 2))
    (alone,) = engine.capture_layers(rows[:1], (0, 2))
    handle.remove()
    assert ran == []
    assert torch.equal(alone, chosen)


def test_hooks_are_gone_after_a_failure(engine: Engine):
    """A forward that fails leaves the model as it was (transformers keeps hooks of its own)."""
    layers = engine.model.get_decoder().layers
    before = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    with pytest.raises(IndexError):
        engine.capture([torch.tensor([10_000])], (1,))
    assert before == [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]


def test_states_carry_no_graph(engine: Engine, rows: list[torch.Tensor]):
    """Captured states are plain tensors that training can use: no gradient, no inference mode."""
    ((states, last),) = engine.capture(rows[:1], (1,))
    assert not states.requires_grad
    assert not states.is_inference()
    assert not last.requires_grad


def test_bad_requests_are_refused(engine: Engine, rows: list[torch.Tensor]):
    """A layer id outside 0..N or an empty row is an error before anything runs."""
    for ids in ((5,), (-1,)):
        with pytest.raises(VerifierError, match=r"0\.\.4"):
            engine.capture(rows, ids)
    with pytest.raises(VerifierError, match="empty"):
        engine.capture([rows[0], torch.tensor([], dtype=torch.int64)], (1,))
    with pytest.raises(VerifierError, match="no layers"):
        engine.capture_layers(rows, ())
