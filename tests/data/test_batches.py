"""Batches: a pure function of (seed, epoch, step, rank, world size), with every document once and whole."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from data_toys import fake_capture
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators.data.batches import Batches, build_row, pack, rows_of_step
from speculators.data.capture import OnlineStates
from speculators.data.encoded import Encoded
from speculators.data.prefetch import Prefetcher
from speculators.errors import DataError

CPU = torch.device("cpu")


def make(conversations, **keys) -> Batches:
    source = OnlineStates(conversations, fake_capture, "bfloat16")
    settings = {"row_tokens": 100, "rows_per_step": 4, "seed": 3, "dtype": torch.float32, "widths": (6, 3), **keys}
    return Batches(conversations=conversations, source=source, **settings)


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_document_once_within_the_budget(lengths, seed, epoch):
    """Each document is whole in exactly one row, and no row exceeds its capacity."""
    rows = pack(lengths, row_tokens=64, seed=seed, epoch=epoch)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= 64 for row in rows)


def test_packing_is_first_fit(monkeypatch):
    """Packing gives the same rows as plain first-fit over the same permutation."""
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    order = np.random.default_rng([5, 2]).permutation(200)
    plain: list[list[int]] = []
    for index in order:
        fitting = [row for row in plain if sum(lengths[k] for k in row) + lengths[index] <= 100]
        if not fitting:
            plain.append([])
        (fitting or [plain[-1]])[0].append(int(index))
    assert {tuple(row) for row in plain} == set(pack(lengths, row_tokens=100, seed=5, epoch=2))


def test_packing_stays_what_it_was():
    """The rows of an epoch are those that every earlier version made: other rows would be another run."""
    rows = pack([9, 4, 7, 3, 8, 2, 6, 5], row_tokens=12, seed=7, epoch=1)
    assert list(rows) == [(7,), (1, 2), (6, 3, 5), (0,), (4,)]
    assert (rows[-2], rows[1:3]) == ((0,), [(1, 2), (6, 3, 5)])
    assert list(pack([], row_tokens=12, seed=7, epoch=1)) == []


def test_packing_wastes_little():
    """With the lengths of chats, rows are more than 95% full (99% measured, with room for other seeds)."""
    lengths = np.random.default_rng(1).gamma(3, 70, 2000).astype(int).clip(10, 2048)
    rows = pack(lengths, row_tokens=2048, seed=0, epoch=0)
    assert lengths.sum() / (2048 * len(rows)) > 0.95


def test_epochs_and_seeds_shuffle():
    """The same seed and epoch give the same rows; another epoch or seed gives others."""
    lengths = [7] * 50
    first = list(pack(lengths, row_tokens=20, seed=0, epoch=0))
    assert first == list(pack(lengths, row_tokens=20, seed=0, epoch=0))
    assert first != list(pack(lengths, row_tokens=20, seed=0, epoch=1))
    assert first != list(pack(lengths, row_tokens=20, seed=1, epoch=0))


def test_document_longer_than_a_row():
    """A document that fits into no row raises an error that names the settings; it is not cut silently."""
    with pytest.raises(DataError, match=r"101 tokens does not fit into a row of 100 tokens\n.*row_tokens"):
        pack([5, 101], row_tokens=100, seed=0, epoch=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batch_does_not_depend_on_the_world_size(conversations, world_size):
    """Whatever the number of ranks, together they see the same rows at each step, and each sees the same number."""
    batches = make(conversations)
    rows = batches.packed(0)
    for step in range(batches.steps(0)):
        shares = [
            rows_of_step(rows, step=step, rows_per_step=4, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert len({len(share) for share in shares}) == 1
        together = sorted(row for share in shares for row in share if row)
        assert together == sorted(rows[4 * step : 4 * step + 4])


def test_epoch_covers_all_conversations(conversations):
    """The steps of an epoch, including the last partial one, contain every conversation once."""
    batches = make(conversations)
    seen = [index for step in range(batches.steps(1)) for index in batches.documents(1, step)]
    assert sorted(seen) == list(range(len(conversations)))
    assert sum(batches.tokens(1, step) for step in range(batches.steps(1))) == conversations.lengths.sum()
    assert sum(batches.supervised(1, step) for step in range(batches.steps(1))) == conversations.supervised.sum()


def test_the_steps_of_an_epoch_are_counted_once(conversations, monkeypatch):
    """Every update asks for the steps of all earlier epochs; packing those again would cost more than the update."""
    packed = []
    monkeypatch.setattr("speculators.data.batches.pack", lambda *_, epoch, **__: packed.append(epoch) or [(0,)] * 9)
    batches = make(conversations)
    for _ in range(3):
        assert [batches.steps(epoch) for epoch in range(5)] == [3] * 5
    assert packed == [0, 1, 2, 3, 4]


def test_rank_without_a_row_gets_padding(conversations):
    """If the last step has fewer rows than ranks, the other ranks get a row of padding that supervises nothing."""
    batches = make(conversations, rows_per_step=8, rank=7, world_size=8)
    last = batches.steps(0) - 1
    assert len(batches.packed(0)) % 8 not in (0, 8)
    (row,) = batches(0, last)
    assert not row["loss_mask"].any()
    assert (row["document_ids"] == -1).all()
    assert row["hidden_states"].shape[2:] == (6,)
    assert row["verifier_last_hidden_states"].shape[2:] == (3,)


def test_row_is_what_forward_is_promised(conversations):
    """A row has the names, shapes, types and meaning of the algorithm contract."""
    batches = make(conversations, dtype=torch.bfloat16)
    documents, (row, *_) = batches.packed(0)[0], batches(0, 0)
    tokens = int(conversations.lengths[list(documents)].sum())
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in row.items()} == {
        "hidden_states": ((1, tokens, 6), torch.bfloat16),
        "verifier_last_hidden_states": ((1, tokens, 3), torch.bfloat16),
        "input_ids": ((1, tokens), torch.int64),
        "loss_mask": ((1, tokens), torch.bool),
        "position_ids": ((1, tokens), torch.int64),
        "document_ids": ((1, tokens), torch.int64),
    }
    start = 0
    for place, index in enumerate(documents):
        encoded, end = conversations.row(index), start + int(conversations.lengths[index])
        assert row["input_ids"][0, start:end].tolist() == encoded.input_ids.tolist()
        assert row["loss_mask"][0, start:end].tolist() == encoded.loss_mask.tolist()
        assert row["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert (row["document_ids"][0, start:end] == place).all()
        ((states, last),) = batches.source.states([index])
        assert torch.equal(row["hidden_states"][0, start:end], states)
        assert torch.equal(row["verifier_last_hidden_states"][0, start:end], last)
        start = end


def test_mask_and_states_are_not_shifted():
    """Token t, its mask and its state have the same place, because every shift belongs to the algorithm."""
    encoded = Encoded(np.array([4, 5, 6], np.int32), np.array([False, False, True]))
    states = torch.arange(3.0)[:, None]
    row = build_row([(encoded, (states, states))], widths=(1, 1), dtype=torch.float32)
    assert row["input_ids"].tolist() == [[4, 5, 6]]
    assert row["loss_mask"].tolist() == [[False, False, True]]
    assert row["hidden_states"].flatten().tolist() == [0, 1, 2]


def walk(steps: int):
    """Gives the next step, for epochs of this many steps."""
    return lambda epoch, step: (epoch, step + 1) if step + 1 < steps else None


def test_prefetched_rows_are_the_same(conversations):
    """Rows built ahead on a thread equal those built on demand, even after a jump to another step."""
    batches = make(conversations)
    with Prefetcher(batches, walk(batches.steps(0)), CPU) as ahead:
        for step in (0, 1, 2, 0, 1, batches.steps(0) - 1):
            for got, want in zip(ahead(0, step), batches(0, step), strict=True):
                assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_forward_keeps_its_cast_weights_while_rows_are_built():
    """Building rows leaves autocast blocks, as a verifier's rotary embedding does, and no bit of a gradient changes."""
    torch.manual_seed(0)
    weight, states = torch.nn.Parameter(torch.randn(64, 64)), torch.randn(512, 64)

    def leave_autocast(epoch, step):
        with torch.autocast("cpu", enabled=False):
            return []

    def gradient(build) -> torch.Tensor:
        weight.grad, x = None, states
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(4):
                x = torch.nn.functional.linear(x, weight).float().tanh()
                build()
            x.sum().backward()
        return weight.grad.clone()

    with Prefetcher(leave_autocast, lambda epoch, step: None, CPU) as ahead:
        assert torch.equal(gradient(lambda: ahead(0, 0)), gradient(lambda: None))


def test_rows_are_built_on_the_gpu_of_their_process(monkeypatch):
    """The thread works on the GPU of its rank; a new thread's own would be the first one of the machine."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread(), device)))
    with Prefetcher(lambda epoch, step: [], lambda epoch, step: None, torch.device("cuda", 3)) as ahead:
        ahead(0, 0)
    ((thread, device),) = chosen
    assert device == torch.device("cuda", 3)
    assert thread is not threading.main_thread()


def test_prefetcher_works_one_step_ahead():
    """While a step computes, only the next one is built."""
    made = []
    with Prefetcher(lambda epoch, step: made.append(step) or [], walk(9), CPU) as ahead:
        ahead(0, 0)
    assert made in ([0], [0, 1])
    with Prefetcher(lambda epoch, step: made.append(step) or [], walk(3), CPU) as ahead:
        made.clear()
        for step in range(3):
            ahead(0, step)
    assert made == [0, 1, 2]


def test_prefetcher_raises_where_the_rows_are_needed():
    """An error on the thread is raised by the call that needs those rows: neither earlier nor never."""

    def fail_at_two(epoch, step):
        if step == 2:
            raise DataError("shard 5 is damaged")
        return []

    with Prefetcher(fail_at_two, walk(5), CPU) as ahead:
        assert ahead(0, 0) == ahead(0, 1) == []
        with pytest.raises(DataError, match="shard 5 is damaged"):
            ahead(0, 2)
