"""`[verifier]` and `[data]`: the model, the conversations, and where the model's states for them come from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import attrs
from attrs import field

from speculators.config import positive
from speculators.recipe.field_map import FieldMap
from speculators.recipe.source_files import SUFFIXES, is_pattern
from speculators.structure import validators
from speculators.structure.validators import between, each, matches, not_empty, not_negative, one_of, server_url

DTYPES = ("float32", "bfloat16", "float16")
FP8 = "fp8"
HEX_64 = matches(r"[0-9a-f]{64}", "64 lower-case hex digits")


def is_file_path(text: str) -> bool:
    """Tells a path from a hub id: a path is absolute, starts with `./`, `../` or `~`, or has a data file's suffix."""
    return text.startswith(("/", "./", "../", "~")) or text.endswith((".jsonl", ".json"))


def is_data_path(text: str) -> bool:
    """Tells the path of rows from the hub id of a data set: any file path, or a pattern such as `rows/*.parquet`."""
    return is_file_path(text) or is_pattern(text) or text.endswith(SUFFIXES)


def _data_path(_: object, __: attrs.Attribute[Any], value: str) -> None:
    not_empty(_, __, value)
    if "\0" in value:
        raise ValueError("must not contain a NUL character")


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


# What transformers itself passes to a template.
_TEMPLATE_INPUTS = ("messages", "tools", "documents", "add_generation_prompt")


def _template(_: object, __: attrs.Attribute[Any], value: Mapping[str, Any]) -> None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"names of arguments have letters, digits and _, got {name!r}")
        if name in _TEMPLATE_INPUTS:
            raise ValueError(f"{name} comes from the conversation and cannot be set here")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("arguments are texts, numbers, true or false, and lists and tables of them") from None


@attrs.frozen(kw_only=True)
class VerifierSection:
    """`[verifier]`: the model that the draft is trained for.

    Attributes:
        model: a hub id, local folder, `.gguf` file, `wheel:NAME==VERSION#path/in/wheel`, or `tiny:SEED`.
        revision: commit of a hub id.
        sha256: hash of the GGUF file, checked before the file is opened.
        dtype: precision in which the verifier runs.
        trust_remote_code: let transformers run code that comes with the model.
        template: arguments of the chat template, by name (`{ enable_thinking = false }`), for training data,
            regeneration, suites and servers alike.
        chat_template: a Jinja file that replaces the model's chat template.
    """

    model: str = field(validator=_model)
    revision: str | None = None
    sha256: str | None = field(default=None, validator=HEX_64)
    dtype: str = field(default="bfloat16", validator=one_of(*DTYPES))
    trust_remote_code: bool = False
    template: dict[str, Any] = field(factory=dict, validator=_template)
    chat_template: str | None = field(default=None, validator=attrs.validators.optional(not_empty))

    @property
    def kind(self) -> str:
        """Where the model comes from: "wheel", "tiny", "gguf", "folder" or "hub"."""
        if self.model.startswith(("wheel:", "tiny:")):
            return self.model.partition(":")[0]
        if self.model.endswith(".gguf"):
            return "gguf"
        return "folder" if is_file_path(self.model) else "hub"

    @property
    def short_name(self) -> str:
        """The last part of the id or path, without the ending of a file: what people call the verifier."""
        last = self.model.rsplit("/", 1)[-1]
        return last.removesuffix(".gguf") if self.kind in ("wheel", "gguf") else last

    def __attrs_post_init__(self) -> None:
        if self.kind == "wheel" and self.sha256 is None:
            raise ValueError("a wheel: model needs sha256, the hash of the GGUF file inside: it is checked before use")
        if self.sha256 is not None and self.kind not in ("wheel", "gguf"):
            raise ValueError(f'sha256 is for .gguf files and wheel: models, not for a {self.kind}; set it to "none"')
        if self.revision is not None and self.kind != "hub":
            raise ValueError(f'revision is for hub ids, not for a {self.kind}; set it to "none"')


@attrs.frozen(kw_only=True)
class DataSource:
    """One source of conversations: files, or a data set of the hub.

    Attributes:
        path: a file, a folder or a pattern (`convs/*.parquet`), relative to the file that names it, or the hub id of a
            data set. Files are JSONL, JSON, either with .gz or .zst, Parquet or Arrow; several are read in the order of
            their names.
        split: the split of a data set (by default "train"); for files, the rows with this value in the field `split`.
            In a folder, a name such as train-00000.parquet states the split of its rows.
        take: use only the first conversations, this many; None for all.
        subset: the part of a data set that has a name of its own ("main"), what `datasets` calls its configuration.
        revision: commit of a data set.
        sha256: hash that the file must have.
        map: the fields that hold prompt, completion, text, messages and so on; None for the layouts that are known.
    """

    path: str = field(validator=_data_path)
    split: str | None = None
    take: int | None = field(default=None, validator=positive)
    subset: str | None = None
    revision: str | None = None
    sha256: str | None = field(default=None, validator=HEX_64)
    map: FieldMap | None = None

    @property
    def is_local(self) -> bool:
        """Whether `path` names files rather than a data set of the hub."""
        return is_data_path(self.path)


@attrs.frozen(kw_only=True)
class Regenerate:
    """`[data.regenerate]`: replace the answers with the verifier's own continuations.

    Attributes:
        max_new_tokens: length at which an answer is cut.
        temperature: 0 is greedy; above 0, answers are sampled from the whole distribution.
        batch_size: prompts answered at once.
        seed: seed of the samples.
        dtype: precision in which the verifier answers; None for `verifier.dtype`.
    """

    max_new_tokens: int = field(default=160, validator=positive)
    temperature: float = field(default=0.0, validator=not_negative)
    batch_size: int = field(default=64, validator=positive)
    seed: int = field(default=0, validator=validators.seed)
    dtype: str | None = field(default=None, validator=attrs.validators.optional(one_of(*DTYPES)))


@attrs.frozen(kw_only=True)
class StatesServerSection:
    """`[data.server]`: the vLLM servers that compute the states if `hidden_states` is "server" or "streamed".

    No fingerprint contains any of this: where a server is and how busy it is does not change what a state means.

    Attributes:
        endpoints: URLs of the servers, which share the work.
        folder: where the servers write states and training reads them; None for a folder of their own in the cache.
        concurrency: conversations in flight at once, at all servers and for all processes together.
        retries: attempts to repeat a request that failed at every server for a passing reason; each waits twice as long
            as the last.
        timeout: seconds allowed for one conversation.
        evaluate: let it answer the suites as well, so that no process loads the verifier; drafts are then measured by
            replay alone.
    """

    endpoints: tuple[str, ...] = field(default=("http://127.0.0.1:8000",), validator=each(server_url))
    folder: str | None = field(default=None, validator=attrs.validators.optional(not_empty))
    concurrency: int = field(default=8, validator=positive)
    retries: int = field(default=6, validator=not_negative)
    timeout: float = field(default=600.0, validator=positive)
    evaluate: bool = False

    def requests_at_once(self, world_size: int) -> int:
        """Conversations in flight at once for each process."""
        return max(1, self.concurrency // world_size)


def _store_url(_: object, __: attrs.Attribute[Any], value: str) -> None:
    matches(r"[a-z][a-z0-9+.-]*://[^?#]+", 'the URL of a folder, such as "s3://bucket/states"')(_, __, value)
    inside = value.partition("://")[2].split("/")
    # fsspec reads "::" as a chain of file systems, some of which write to the local disk.
    if ".." in inside or "::" in value:
        raise ValueError(f'must name one folder, without ".." and "::", got "{value}"')
    if re.match(r"[^@]*:[^@]*@", inside[0]):
        raise ValueError("must not contain a password: a recipe is kept with its run; credentials come from outside")


def _train_on(_: object, __: attrs.Attribute[Any], value: str | tuple[int, ...]) -> None:
    if isinstance(value, str):
        one_of("all", "last")(_, __, value)
    elif not value:
        raise ValueError('must name at least one answer, "all" or "last"')


@attrs.frozen(kw_only=True)
class DataSection:
    """`[data]`: conversations, and how the verifier's states for them reach training.

    Attributes:
        sources: files and data sets, read one after the other.
        max_tokens: length at which a conversation is cut.
        hidden_states: "online" computes the states during training, "cached" captures them to disk first, "server"
            lets vLLM servers capture them, "streamed" lets servers compute them during training.
        states_dtype: precision in which the states for training are computed and stored; "fp8" stores in 8 bits what is
            computed in bfloat16.
        train_on: "all" answers of a conversation, the "last" one, or their places: `[0, -1]` is the first and the last.
        allow_lost: the largest share of conversations that may be left out; above it, the data are refused.
        store: URL of a folder of stored states, such as "s3://bucket/states", which is read instead of the cache.
        regenerate: how the verifier rewrites the answers; None keeps the answers of the sources.
        server: the server that computes the states, if one does.
    """

    sources: tuple[DataSource, ...] = field(validator=not_empty)
    max_tokens: int = field(default=2048, validator=positive)
    hidden_states: str = field(default="online", validator=one_of("online", "cached", "server", "streamed"))
    states_dtype: str = field(default="bfloat16", validator=one_of(*DTYPES, FP8))
    train_on: str | tuple[int, ...] = field(default="all", validator=_train_on)
    allow_lost: float = field(default=0.5, validator=between(0, 1))
    store: str | None = field(default=None, validator=attrs.validators.optional(_store_url))
    regenerate: Regenerate | None = None
    server: StatesServerSection = StatesServerSection()

    @property
    def stored(self) -> bool:
        """Whether the states are on disk before training begins."""
        return self.hidden_states in ("cached", "server")

    @property
    def capture_dtype(self) -> str:
        """Precision in which the verifier computes the states."""
        return "bfloat16" if self.states_dtype == FP8 else self.states_dtype

    @property
    def served(self) -> bool:
        """Whether servers compute the states."""
        return self.hidden_states in ("server", "streamed")

    @property
    def evaluates_served(self) -> bool:
        """Whether the first of them answers the suites, too."""
        return self.served and self.server.evaluate

    @property
    def online(self) -> bool:
        """Whether the processes that train compute the states meanwhile."""
        return self.hidden_states == "online"
