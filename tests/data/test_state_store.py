"""The hidden-state store: what is written comes back, survives kills, and damage is found, named and mended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import attrs
import pytest
import safetensors.torch
import torch
from data_toys import fake_capture

from speculators.data import store as state_store
from speculators.data.batches import Batches
from speculators.data.capture import OnlineStates, StateWriter, fill, fill_stream
from speculators.data.state_types import from_stored, to_stored
from speculators.data.store import DamagedShards, StateStore, shard_name, states_digest
from speculators.data.store_layout import StoreLayout, plan_shards, shard_tokens_for, store_bytes
from speculators.errors import ArtifactError, DataError
from speculators.verifier.engine import Engine


@pytest.fixture
def dtype():
    """The stored type, where a test is not parametrised with others."""
    return "bfloat16"


@pytest.fixture
def layout(conversations, dtype):
    return StoreLayout(key="k1", lengths=conversations.lengths, aux_width=6, width=3, dtype=dtype, shard_tokens=300)


with_fp8 = pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "states"


@pytest.fixture
def store(folder, layout, conversations):
    writer = StateWriter(folder, layout)
    fill(writer, conversations, fake_capture)
    return writer.finish()


def captured(conversations, index, dtype="bfloat16"):
    ids = torch.from_numpy(conversations.row(index).input_ids).long()
    ((_, states, last),) = fake_capture([ids])
    return from_stored(to_stored(states, last, dtype), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "fp8"])
def test_states_come_back_exactly(store, layout, conversations, dtype):
    """Every conversation's states are read back as captured, rounded once to the stored type."""
    assert len(layout.shards) > 2
    for index in range(len(conversations)):
        for got, want in zip(store.read(index), captured(conversations, index, dtype), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@with_fp8
def test_online_and_cached_states_are_equal(store, conversations, dtype):
    """States computed on demand equal those in a store of the same type."""
    online = OnlineStates(conversations, fake_capture, dtype)
    for cached, computed in zip(store.states([5, 0, 17]), online.states([5, 0, 17]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(cached, computed, strict=True))


def test_cached_and_online_rows_of_a_real_verifier_agree(tiny_verifier, tmp_path, conversations):
    """Packed rows from the store equal rows computed on the fly, though the verifier ran in other batches.

    Tolerance: both are float32, but batches of other shapes round sums differently; 1e-4 of values of up to 40.
    """
    engine = Engine(tiny_verifier)
    capture = partial(engine.capture_all, layer_ids=(1, 2))
    wide = StoreLayout(key="k", lengths=conversations.lengths, aux_width=64, width=32, dtype="float32")
    writer = StateWriter(tmp_path / "real", wide)
    fill(writer, conversations, capture)
    sources = (writer.finish(), OnlineStates(conversations, capture, "float32"))
    shape = {"widths": (64, 32), "row_tokens": 200, "rows_per_step": 3, "seed": 0, "dtype": torch.float32}
    cached, online = (Batches(conversations=conversations, source=source, **shape) for source in sources)
    for got, want in zip(cached(0, 0), online(0, 0), strict=True):
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=0)


def test_shards_are_plain_safetensors(store, folder, layout):
    """A shard is an ordinary safetensors file, readable without this package."""
    held = safetensors.torch.load_file(folder / shard_name(0))
    assert held["hidden_states"].shape == (layout.rows(0), 6)
    assert held["last"].shape == (layout.rows(0), 3)


@with_fp8
@pytest.mark.parametrize("layers", [1, 2])
def test_a_last_layer_that_is_read_is_stored_once(tmp_path, layout, conversations, dtype, layers):
    """States of which the last H columns are the last layer's come back whole, from a store without these columns."""

    def ending_in_last(rows):
        for place, states, last in fake_capture(rows):
            yield place, torch.cat([states[:, : 3 * layers - 3], last], 1), last

    stores = []
    for once in (True, False):
        kept = attrs.evolve(layout, aux_width=3 * layers, ends_in_last=once)
        writer = StateWriter(tmp_path / str(once), kept)
        fill(writer, conversations, ending_in_last)
        stores.append(writer.finish())
    for index in range(len(conversations)):
        for one, other in zip(*(store.read(index) for store in stores), strict=True):
            assert torch.equal(one, other)
    once, twice = (store.layout.bytes_for(1) for store in stores)
    assert twice / once == pytest.approx((layers + 1) / layers)
    assert StoreLayout.from_json(stores[0].layout.to_json()).ends_in_last


def test_a_layout_of_an_earlier_version_is_the_one_of_today(layout):
    """What was written before a last layer was stored once is read, and an interrupted capture goes on."""
    written = layout.to_json()
    assert "ends_in_last" not in written
    assert not StoreLayout.from_json(written).ends_in_last


@with_fp8
def test_size_is_known_beforehand(store, folder, layout, conversations, dtype):
    """The size that a plan announces is the size on disk, apart from the headers."""
    announced = store_bytes(int(conversations.lengths.sum()), aux_width=6, width=3, dtype=dtype)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 <= size - announced <= 512 * len(layout.shards)


def test_shards_are_a_pure_function_of_lengths():
    """Each conversation is in one shard, in order of length, within the budget; a longer one has its own shard."""
    lengths = [5, 50, 7, 7, 3, 9]
    shards = plan_shards(lengths, 20)
    assert [shard.tolist() for shard in shards] == [[4, 0, 2], [3, 5], [1]]
    assert plan_shards([], 20) == ()


def test_a_large_store_has_larger_shards_instead_of_more():
    """Up to 4,096 shards a store has the device's; then shards grow, up to 512 MiB."""
    choose = partial(shard_tokens_for, row_bytes=2**12, at_least=2**13)
    assert choose(2**25) == 2**13
    assert choose(2**25 + 1) == 2**13 + 1
    assert choose(2**40) == 2**17
    assert shard_tokens_for(2**40, 2**20, at_least=2**13) == 2**13


def test_cut_shard_is_named_and_only_it_is_captured_again(store, folder, layout, conversations):
    """A truncated shard is noticed on opening, named, and repaired by capturing only its conversations again."""
    path = folder / shard_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(
        DamagedShards, match=rf"states-00001\.safetensors \({len(content) - 10} bytes instead of"
    ) as caught:
        StateStore.open(folder)
    assert caught.value.shards == (1,)
    seen = []

    def spying(rows):
        seen.append(len(rows))
        yield from fake_capture(rows)

    writer = StateWriter(folder, layout)
    assert (writer.missing(), list(writer.damaged)) == ([1], [1])
    # From here on the store is incomplete, also for those who look at sizes only.
    with pytest.raises(ArtifactError, match="not complete"):
        StateStore.open(folder)
    fill(writer, conversations, spying)
    writer.finish()
    assert seen == [len(layout.shards[1])]
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "no readable header"),
        (lambda path: path.write_bytes(b"\xff" * 400), "no readable header"),
        (lambda path: shutil.copy(path.with_name(shard_name(2)), path), "its header does not describe"),
    ],
)
def test_damage_that_opening_finds(store, folder, harm, said):
    """A shard that is missing, empty, garbage or swapped is noticed without reading the whole store."""
    harm(folder / shard_name(0))
    with pytest.raises(DamagedShards, match=said) as caught:
        StateStore.open(folder)
    assert caught.value.shards == (0,)


@with_fp8
def test_flipped_bit_is_found_on_demand(store, folder, layout):
    """The sha256 reveals one altered bit to whoever asks for all shards; continuing a store does not hash it."""
    path = folder / shard_name(2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    StateStore.open(folder)
    with pytest.raises(DamagedShards, match=r"states-00002.*sha256"):
        StateStore.open(folder, check="all")
    assert StateWriter(folder, layout).missing() == []


@pytest.mark.parametrize(
    ("notes", "dtype"), [("of today", "bfloat16"), ("of earlier versions", "bfloat16"), ("of today", "fp8")]
)
def test_flipped_bit_is_found_before_its_values_are_used(folder, layout, conversations, store, notes, dtype):
    """Whoever reads states first compares them with their sha256, though nobody hashed the store when it was opened;
    a store whose notes have no digest of each conversation is hashed shard by shard."""
    note, path = folder / "states-00001.json", folder / shard_name(1)
    if notes == "of earlier versions":
        note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "conversations"}))
    *others, last = layout.shards[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = StateStore.open(folder, check="none")
    with pytest.raises(DamagedShards, match=r"states-00001.*sha256") as caught:
        opened.read(last)
    assert (caught.value.folder, caught.value.shards) == (folder, (1,))
    for index in [*layout.shards[0], *(others if notes == "of today" else ())]:
        assert torch.equal(opened.read(index)[0], captured(conversations, index, dtype)[0])


def test_states_are_compared_once(store, layout, monkeypatch):
    """Later epochs read without hashing."""
    hashed = []
    monkeypatch.setattr(state_store, "states_digest", lambda *states: hashed.append(1) or states_digest(*states))
    for _ in range(2):
        store.states(layout.shards[0])
    assert len(hashed) == len(layout.shards[0])


def test_a_shard_is_opened_by_its_first_read(folder, layout, store):
    """Opening a store with 100,000 shards opens none of them; one that is missing is named by whoever reads it."""
    (folder / shard_name(1)).unlink()
    opened = StateStore.open(folder, check="none")
    opened.read(layout.shards[0][0])
    with pytest.raises(DamagedShards, match=r"states-00001\.safetensors \(missing\)"):
        opened.read(layout.shards[1][0])


def test_unreadable_note_costs_its_shard_only(store, folder, layout):
    """A shard with a damaged note is captured again; nothing else is affected."""
    (folder / "states-00001.json").write_text('{"format": 1')
    writer = StateWriter(folder, layout)
    assert writer.missing() == [1]
    assert writer.damaged == {1: "its note is unreadable"}


def test_file_that_shrinks_while_open_is_an_error(store, folder, layout):
    """Reading a shard that was cut after opening raises an error; an open memory map would kill the process."""
    store.read(layout.shards[0][0])
    os.truncate(folder / shard_name(0), 200)
    with pytest.raises(ArtifactError, match=r"states-00000\.safetensors: cut short"):
        store.read(layout.shards[0][-1])


def test_states_of_other_inputs_are_refused(store, folder, layout):
    """A stale store is never reused: another key or another layout raises an error."""
    with pytest.raises(ArtifactError, match="states of different inputs"):
        StateStore.open(folder, key="k2")
    other = StoreLayout(key="k2", lengths=layout.lengths, aux_width=6, width=3, dtype="bfloat16", shard_tokens=300)
    with pytest.raises(ArtifactError, match="holds states of different inputs"):
        StateWriter(folder, other)


def test_captured_length_must_be_the_conversations(folder, layout):
    """States for fewer tokens than the conversation has, which a prefix cache causes, are refused."""
    length = layout.lengths[3]
    with pytest.raises(DataError, match=rf"conversation 3 has {length} tokens, but {length - 1} states"):
        StateWriter(folder, layout).append(3, (torch.zeros(length - 1, 6), torch.zeros(length - 1, 3)))


def test_overflow_in_the_stored_type_is_an_error(folder, layout):
    """Residual streams exceed float16's range: an infinite state raises an error that names the setting."""
    narrow = StoreLayout(key="k", lengths=layout.lengths, aux_width=6, width=3, dtype="float16")
    states = torch.full((int(layout.lengths[3]), 6), 70_000.0)
    with pytest.raises(DataError, match=r'not finite in float16\n.*states_dtype = "bfloat16"'):
        StateWriter(folder, narrow).append(3, to_stored(states, states[:, :3], "float16"))


@with_fp8
def test_states_that_are_not_finite_are_refused(folder, layout, dtype):
    """A verifier that computed NaN or infinity is an error, not something to learn from."""
    states = torch.ones(int(layout.lengths[3]), 6)
    states[2, 4] = float("nan")
    with pytest.raises(DataError, match=f"conversation 3: its states are not finite in {dtype}"):
        StateWriter(folder, layout).append(3, to_stored(states, states[:, :3], dtype))


def test_full_disk_leaves_no_half_shard(folder, layout, conversations, monkeypatch):
    """A full disk inside a shard raises one clear error; complete shards stay, and capture resumes."""
    writes = []
    whole = Path.open

    def limited(self, mode="r", *args, **keys):
        file = whole(self, mode, *args, **keys)
        if mode != "wb" or ".safetensors" not in self.name:
            return file
        writes.append(self.name)
        if len(writes) == 3:
            real = file.write

            def partly(content):
                real(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

            return _Wrapped(file, partly)
        return file

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(ArtifactError, match=r"states-00002\.safetensors: the disk is full\n.*what is complete is kept"):
        fill(StateWriter(folder, layout), conversations, fake_capture)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [
        "layout.json",
        *(f"states-0000{k}.{end}" for k in (0, 1) for end in ("json", "safetensors")),
    ]
    writer = StateWriter(folder, layout)
    assert writer.missing()[0] == 2
    fill(writer, conversations, fake_capture)
    assert torch.equal(writer.finish().read(7)[0], captured(conversations, 7)[0])


class _Wrapped:
    """A file with another `write`."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_store_larger_than_the_disk_is_refused_before_the_work(folder, layout, monkeypatch):
    """A store that will not fit raises an error before the first forward, with the sizes and a way out."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 10))
    with pytest.raises(ArtifactError, match=r'need .* GB more.*\n.*hidden_states = "online"'):
        StateWriter(folder, layout)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {toys!r})
from data_toys import fake_capture
from speculators.data.batches import Batches
from speculators.data.capture import StateWriter, fill
from speculators.data.encoded import Conversations
from speculators.data.store_layout import StoreLayout
conversations = Conversations.open(Path({prepared!r}))
layout = StoreLayout(key="k1", lengths=conversations.lengths, aux_width=6, width=3, dtype={dtype!r}, shard_tokens=300)
def slow(rows):
    for captured in fake_capture(rows):
        yield captured
        print("captured", flush=True)
        time.sleep(0.002)
fill(StateWriter(Path({folder!r}), layout), conversations, slow)
"""


@pytest.mark.parametrize(("after", "dtype"), [(1, "bfloat16"), (14, "bfloat16"), (14, "fp8")])
def test_kill_keeps_complete_shards(folder, layout, conversations, after, dtype, tmp_path):
    """A writer killed by SIGKILL leaves only whole shards; the next one keeps them and ends with the same bytes."""
    places = {"toys": str(Path(__file__).parents[1]), "prepared": str(conversations.folder), "folder": str(folder)}
    code = CHILD.format(**places, dtype=dtype)
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    for _ in range(after):
        assert child.stdout.readline()
    # The writing thread may lag behind what is captured.
    while after > len(layout.shards[0]) and not (folder / "states-00000.json").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with pytest.raises(ArtifactError, match="not complete"):
        StateStore.open(folder)
    (folder / "states-00009.safetensors.tmp").write_bytes(b"what a kill in the middle of a write leaves")
    writer = StateWriter(folder, layout)
    kept = len(layout.shards) - len(writer.missing())
    assert (kept > 0) == (after > len(layout.shards[0]))
    assert not writer.damaged
    fill(writer, conversations, fake_capture)
    resumed = writer.finish()
    assert not list(folder.glob("*.tmp"))

    straight = StateWriter(tmp_path / "straight", layout)
    fill(straight, conversations, fake_capture)
    straight.finish()
    for number in range(len(layout.shards)):
        assert (folder / shard_name(number)).read_bytes() == (tmp_path / "straight" / shard_name(number)).read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["tokens"] == int(conversations.lengths.sum())
    assert resumed.layout.key == "k1"


def test_shards_can_be_shared_out(folder, layout, conversations):
    """Two processes capture disjoint shards of one store, and either may finish it."""
    writers = [StateWriter(folder, layout), StateWriter(folder, layout)]
    for rank, writer in enumerate(writers):
        fill(writer, conversations, fake_capture, rank=rank, world_size=2)
    store = writers[0].finish()
    assert torch.equal(store.read(11)[1], captured(conversations, 11)[1])


def test_a_process_that_starts_late_takes_its_own_share(folder, layout, conversations):
    """A process takes its share of the listed shards, whatever others wrote since, and reads nothing."""
    first = StateWriter(folder, layout)
    lacking = first.missing()
    fill(first, conversations, fake_capture, rank=0, world_size=2)
    late = StateWriter(folder, layout, missing=lacking)
    assert late.missing() == lacking
    fill(late, conversations, fake_capture, rank=1, world_size=2)
    assert torch.equal(first.finish().read(11)[1], captured(conversations, 11)[1])


def test_a_shard_whose_note_is_lost_is_missing_even_if_it_is_not_listed(store, folder, layout):
    """A store with a shard without a note could not be finished."""
    (folder / "states-00001.json").unlink()
    assert StateWriter(folder, layout, missing=[2]).missing() == [1, 2]


def test_a_shard_has_one_buffer(folder, layout, conversations, monkeypatch):
    """A shard allocates one buffer, not one for each conversation."""
    made, real = [], StateWriter._buffer
    monkeypatch.setattr(StateWriter, "_buffer", lambda self, number: made.append(number) or real(self, number))
    fill(StateWriter(folder, layout), conversations, fake_capture)
    assert made == list(range(len(layout.shards)))


def test_a_stream_of_many_conversations_fills_the_same_store(folder, layout, conversations, store, tmp_path):
    """Conversations are taken across shards and come back in any order, yet the store has the same bytes."""
    most = 0

    def stream(rows):
        nonlocal most
        waiting = []
        for index, ids in rows:
            waiting.append((index, ids))
            most = max(most, len({int(layout.places[one][0]) for one, _ in waiting}))
            if len(waiting) == 12:
                yield from answered(waiting.pop(5))
        while waiting:
            yield from answered(waiting.pop())

    def answered(one):
        ((_, states, last),) = fake_capture([one[1]])
        yield one[0], states, last

    writer, events = StateWriter(tmp_path / "streamed", layout), []
    fill_stream(writer, conversations, stream, progress=events.append)
    writer.finish()
    assert most > 1
    for number in range(len(layout.shards)):
        assert (tmp_path / "streamed" / shard_name(number)).read_bytes() == (folder / shard_name(number)).read_bytes()
    assert events[-1].done == events[-1].total == conversations.lengths.sum()


def test_the_verifier_goes_on_while_a_shard_is_written(folder, layout, conversations, store, tmp_path, monkeypatch):
    """A thread checks, hashes and writes: the next shard is captured meanwhile, and the store has the same bytes."""
    second_begun, waited = threading.Event(), []
    write = StateWriter.write

    def patient(self, number, states):
        waited.append(second_begun.wait(20))
        write(self, number, states)

    def telling(rows):
        if telling.begun:
            second_begun.set()
        telling.begun = True
        yield from fake_capture(rows)

    telling.begun = False
    monkeypatch.setattr(StateWriter, "write", patient)
    writer = StateWriter(tmp_path / "beside", layout)
    fill(writer, conversations, telling)
    writer.finish()
    assert all(waited)
    for path in folder.iterdir():
        assert (tmp_path / "beside" / path.name).read_bytes() == path.read_bytes()


def test_an_error_of_the_writing_thread_ends_capture_at_once(folder, layout, conversations, monkeypatch):
    """The verifier does not compute the rest of a store that cannot be written."""
    captured_shards, failed = [], threading.Event()

    def failing(self, number, states):
        failed.set()
        raise ArtifactError("the disk is full")

    def counting(rows):
        if captured_shards:
            failed.wait(20)
        captured_shards.append(len(rows))
        yield from fake_capture(rows)

    monkeypatch.setattr(StateWriter, "write", failing)
    with pytest.raises(ArtifactError, match="the disk is full"):
        fill(StateWriter(folder, layout), conversations, counting)
    assert len(captured_shards) < len(layout.shards)


def test_an_interrupted_capture_ends_its_threads(folder, layout, conversations):
    """After Ctrl-C no thread writes on into a store that the next process may already continue."""
    before = threading.active_count()

    def interrupted(rows):
        yield from fake_capture(rows)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(StateWriter(folder, layout), conversations, interrupted)
    assert threading.active_count() == before


def test_progress_counts_tokens(folder, layout, conversations):
    """Capture reports tokens done, their total, and its speed."""
    events = []
    fill(StateWriter(folder, layout), conversations, fake_capture, progress=events.append)
    assert events[-1].done == events[-1].total == conversations.lengths.sum()
    assert "tokens/s" in events[-1].note
