"""States in object stores: read by ranges through fsspec, compared with their hashes, and never written."""

from __future__ import annotations

import attrs
import pytest
import torch
from data_toys import fake_capture

from speculators.data.batches import Batches
from speculators.data.capture import StateWriter, fill
from speculators.data.shard_files import RemoteFiles, Span
from speculators.data.store import DamagedShards, StateStore, shard_name
from speculators.data.store_layout import StoreLayout
from speculators.errors import ArtifactError, DataError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["bfloat16", "fp8"])
def local(request, tmp_path, conversations):
    """A store in a folder."""
    layout = StoreLayout(
        key="k1", lengths=conversations.lengths, aux_width=6, width=3, dtype=request.param, shard_tokens=300
    )
    writer = StateWriter(tmp_path / "states", layout)
    fill(writer, conversations, fake_capture)
    return writer.finish()


@pytest.fixture(params=["memory://bucket/states", "file://{folder}/bucket"])
def url(request, local, tmp_path):
    """The same store under a URL."""
    url = request.param.format(folder=tmp_path)
    system, root = fsspec.core.url_to_fs(url)
    system.put(str(tmp_path / "states"), f"{root}/k1", recursive=True)
    yield f"{url}/k1"
    system.rm(root, recursive=True)


def change(url: str, name: str, content: bytes) -> None:
    with fsspec.open(f"{url}/{name}", "wb") as file:
        file.write(content)


def content_of(url: str, name: str) -> bytes:
    with fsspec.open(f"{url}/{name}", "rb") as file:
        return file.read()


def test_batches_are_those_of_the_folder(local, url, conversations):
    """Every row of an epoch has the same bits from a URL as from the folder that was copied there."""
    remote = StateStore.of(RemoteFiles.at(url), key="k1", check="all")
    shape = {"widths": (6, 3), "row_tokens": 200, "rows_per_step": 3, "seed": 0, "dtype": torch.bfloat16}
    one, other = (Batches(conversations=conversations, source=source, **shape) for source in (local, remote))
    for step in range(one.steps(0)):
        for row, same in zip(one(0, step), other(0, step), strict=True):
            assert all(torch.equal(tensor, same[name]) for name, tensor in row.items())


def test_only_the_ranges_of_the_conversations_are_read(local, url, monkeypatch):
    """Once its header is known, a shard is never read whole: a conversation costs its own bytes."""
    remote = StateStore.of(RemoteFiles.at(url), check="none")
    remote.read(5)
    spans = []
    read = RemoteFiles.read
    monkeypatch.setattr(RemoteFiles, "read", lambda self, asked: spans.extend(asked) or read(self, asked))
    remote.read(5)
    assert sum(span.size for span in spans) == local.layout.bytes_for(int(local.layout.lengths[5]))


def test_altered_states_are_refused(local, url):
    """A changed byte of a conversation is found when that is read, and nothing is deleted or called local damage."""
    name = shard_name(1)
    content = bytearray(content_of(url, name))
    content[-1] ^= 1
    change(url, name, bytes(content))
    remote = StateStore.of(RemoteFiles.at(url), check="none")
    with pytest.raises(ArtifactError, match=rf"{url}: damaged: {name} .*another sha256.*\n.*copy") as caught:
        remote.states(local.layout.shards[1].tolist())
    assert not isinstance(caught.value, DamagedShards)
    assert content_of(url, name) == content
    with pytest.raises(ArtifactError, match=f"{name} .its sha256"):
        StateStore.of(RemoteFiles.at(url), check="all")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (shard_name(0), b"short", "no readable header"),
        (shard_name(0).replace("safetensors", "json"), b"{", "its note is unreadable"),
        ("manifest.json", b"[]", "manifest.json: damaged"),
        ("manifest.json", b"{}", "damaged, or written by another version: .*shards"),
        ("layout.json", b"{}", "damaged, or written by another version"),
    ],
)
def test_damaged_files_are_named(local, url, name, content, message):
    """A file that is cut short or not what it should be is named with its URL."""
    change(url, name, content)
    with pytest.raises(ArtifactError, match=f"{url}.*{message}"):
        StateStore.of(RemoteFiles.at(url), check="none").states(local.layout.shards[0].tolist())


def test_a_store_of_other_inputs_or_none_is_refused(url):
    """Another key, and a URL without a store, are errors that name the URL."""
    with pytest.raises(ArtifactError, match=f"{url}: states of different inputs"):
        StateStore.of(RemoteFiles.at(url), key="k2")
    with pytest.raises(ArtifactError, match=f"{url}0/manifest.json: missing"):
        StateStore.of(RemoteFiles.at(f"{url}0"))


def test_what_the_network_does_is_not_called_damage(local, url):
    """An error of the object store itself is passed on with its name: the files may be whole."""

    class Broken:
        def cat_ranges(self, *_, **__):
            raise ConnectionResetError("by peer")

    files = attrs.evolve(RemoteFiles.at(url), system=Broken())
    with pytest.raises(DataError, match=r"cannot be read: ConnectionResetError: by peer\n.*network"):
        files.read([Span(shard_name(0), 0, 8)])


def test_kinds_of_url_that_nobody_knows():
    """A URL of an unknown kind is an error that says so."""
    with pytest.raises(DataError, match=r"nowhere://bucket/states: .*nowhere"):
        RemoteFiles.at("nowhere://bucket/states")


@pytest.fixture
def s3(local, tmp_path, monkeypatch):
    """The same store in a server that speaks the protocol of S3."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    system, _ = fsspec.core.url_to_fs("s3://bucket")
    bucket = f"states-{local.layout.dtype}"  # the servers of one process share their buckets
    system.mkdir(bucket)
    system.put(str(tmp_path / "states"), f"{bucket}/k1", recursive=True)
    yield f"s3://{bucket}/k1"
    server.stop()
    system.clear_instance_cache()


def test_s3_gives_the_same_states(local, s3):
    """An S3-compatible server gives each conversation's bits; without the bucket, or the server's, errors say so."""
    remote = StateStore.of(RemoteFiles.at(s3), key="k1", check="all")
    indices = list(range(len(local.layout.lengths)))
    for one, other in zip(local.states(indices), remote.states(indices), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises((ArtifactError, DataError), match=r"s3://elsewhere/states/manifest\.json"):
        StateStore.of(RemoteFiles.at("s3://elsewhere/states"))
