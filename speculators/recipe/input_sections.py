"""What goes into a run: the verifier, and the conversations with the states that it has for them."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import field

from speculators.config import positive
from speculators.structure import validators
from speculators.structure.validators import matches, not_empty, not_negative, one_of, server_url

DTYPES = ("float32", "bfloat16", "float16")
HEX_64 = matches(r"[0-9a-f]{64}", "64 lower-case hex digits")


def is_file_path(text: str) -> bool:
    """Tells a path from a hub id: a path is absolute, starts with `./`, `../` or `~`, or has a data file's suffix."""
    return text.startswith(("/", "./", "../", "~")) or text.endswith((".jsonl", ".json"))


def _model(_: object, __: attrs.Attribute[Any], value: str) -> None:
    if value.startswith("wheel:"):
        matches(r"wheel:[\w.-]+==[\w.+!-]+#.+", '"wheel:NAME==VERSION#path/in/wheel"')(_, __, value)
        inside = value.partition("#")[2]
        if inside.startswith("/") or ".." in inside.split("/") or not inside.endswith(".gguf"):
            raise ValueError(f'must name a .gguf file inside the wheel, got "{inside}"')
    elif value.startswith("tiny:"):
        matches(r"tiny:\d+", '"tiny:SEED"')(_, __, value)
        validators.seed(_, __, int(value.removeprefix("tiny:")))
    elif not is_file_path(value) and not value.endswith(".gguf"):
        known = "a hub id, a local folder (./folder), a .gguf file, wheel:NAME==VERSION#path or tiny:SEED"
        matches(r"[\w.-]+(/[\w.-]+)?", known)(_, __, value)


@attrs.frozen(kw_only=True)
class VerifierSection:
    """`[verifier]`: the model that is drafted for.

    Attributes:
        model: hub id, local folder, `.gguf` file, `wheel:NAME==VERSION#path/in/wheel`, or `tiny:SEED`.
        revision: commit of a hub id.
        sha256: of the GGUF file.
        dtype: in which the verifier runs.
        trust_remote_code: let transformers run code that comes with the model.
    """

    model: str = field(validator=_model)
    revision: str | None = None
    sha256: str | None = field(default=None, validator=HEX_64)
    dtype: str = field(default="bfloat16", validator=one_of(*DTYPES))
    trust_remote_code: bool = False

    @property
    def kind(self) -> str:
        """Returns "wheel", "tiny", "gguf", "folder" or "hub"."""
        if self.model.startswith(("wheel:", "tiny:")):
            return self.model.partition(":")[0]
        if self.model.endswith(".gguf"):
            return "gguf"
        return "folder" if is_file_path(self.model) else "hub"

    @property
    def short_name(self) -> str:
        """Returns what people call the verifier: the last part of its id or path, without a file's ending."""
        last = self.model.rsplit("/", 1)[-1]
        return last.removesuffix(".gguf") if self.kind in ("wheel", "gguf") else last

    def __attrs_post_init__(self) -> None:
        if self.kind == "wheel" and self.sha256 is None:
            raise ValueError("a wheel: model needs sha256, that of the GGUF file inside: it is checked before use")
        if self.sha256 is not None and self.kind not in ("wheel", "gguf"):
            raise ValueError(f'sha256 is for .gguf files and wheel: models, not for a {self.kind}; "none" drops it')
        if self.revision is not None and self.kind != "hub":
            raise ValueError(f'revision is for hub ids, not for a {self.kind}; "none" drops it')


@attrs.frozen(kw_only=True)
class DataSource:
    """One source of conversations: a JSONL file (path relative to the recipe's folder) or a data set's hub id.

    Attributes:
        path: a JSONL file, relative to the file that says it, or the hub id of a data set.
        split: of a data set, "train" if none is said; of a file, the rows whose field `split` it is.
        take: the first so many conversations; None for all.
        revision: commit of a data set.
        sha256: of the file.
    """

    path: str = field(validator=not_empty)
    split: str | None = None
    take: int | None = field(default=None, validator=positive)
    revision: str | None = None
    sha256: str | None = field(default=None, validator=HEX_64)

    @property
    def is_file(self) -> bool:
        """Returns whether `path` is a file rather than a hub id."""
        return is_file_path(self.path)


@attrs.frozen(kw_only=True)
class Regenerate:
    """`[data.regenerate]`: replace the answers by the verifier's own continuations.

    Attributes:
        max_new_tokens: longer answers are cut there.
        temperature: 0 is greedy; above, samples of the whole distribution.
        batch_size: prompts that are answered at once.
        seed: of the samples.
        dtype: in which the verifier answers; None for `verifier.dtype`.
    """

    max_new_tokens: int = field(default=160, validator=positive)
    temperature: float = field(default=0.0, validator=not_negative)
    batch_size: int = field(default=64, validator=positive)
    seed: int = field(default=0, validator=validators.seed)
    dtype: str | None = field(default=None, validator=attrs.validators.optional(one_of(*DTYPES)))


@attrs.frozen(kw_only=True)
class StatesServer:
    """`[data.server]`: the vLLM server that computes the states where `hidden_states = "server"`.

    Where it is and how hard it is worked changes no state's meaning, so nothing of this is in a fingerprint.

    Attributes:
        endpoint: its URL.
        folder: where it writes states and we read them; None for one in the cache that only these states have.
        concurrency: conversations that it has at once, whatever the number of our processes.
        retries: of a request that failed in a way that may pass; each waits twice as long as the one before.
        timeout: seconds that one conversation may take.
    """

    endpoint: str = field(default="http://127.0.0.1:8000", validator=server_url)
    folder: str | None = field(default=None, validator=attrs.validators.optional(not_empty))
    concurrency: int = field(default=8, validator=positive)
    retries: int = field(default=6, validator=not_negative)
    timeout: float = field(default=600.0, validator=positive)


@attrs.frozen(kw_only=True)
class DataSection:
    """`[data]`: conversations and how the verifier's states for them travel.

    Attributes:
        sources: files and data sets, read one after the other.
        max_tokens: longer conversations are cut here.
        hidden_states: "online" computes them during training, "cached" captures them to disk first, "server" has a
            vLLM server do that.
        states_dtype: in which the states for training are computed and kept.
        regenerate: how the verifier rewrites the answers; None keeps those of the sources.
        server: where the states come from if a server computes them.
    """

    sources: tuple[DataSource, ...] = field(validator=not_empty)
    max_tokens: int = field(default=2048, validator=positive)
    hidden_states: str = field(default="online", validator=one_of("online", "cached", "server"))
    states_dtype: str = field(default="bfloat16", validator=one_of(*DTYPES))
    regenerate: Regenerate | None = None
    server: StatesServer = StatesServer()

    @property
    def stored(self) -> bool:
        """Returns whether the states are on disk before training begins."""
        return self.hidden_states != "online"

    @property
    def served(self) -> bool:
        """Returns whether a server computes the states."""
        return self.hidden_states == "server"
