"""`spec try` shows the verifier's own answer, with the accepted drafts apart, and chats."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from command import Spec
from rich.console import Console
from rich.control import strip_control_codes
from rich.theme import Theme

from speculators.api import decode, load_speculator
from speculators.report.answer import AnswerView, TokenText
from speculators.report.console import STYLES

SHORT = ("--max-tokens", "12")


def test_the_answer_is_the_verifiers_with_the_drafted_part_apart(
    spec: Spec, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces make up the answer that the verifier gives without drafts; the last line has K and tokens a pass."""
    outcome = spec("try", run_folder, "Name three colours.", "--k", "2", *SHORT, "--json")
    assert outcome.code == 0, outcome.err
    answer = outcome.json
    monkeypatch.setenv("SPECULATORS_CACHE", str(spec.cache))
    plain = decode(load_speculator(run_folder), "Name three colours.", max_new_tokens=12, num_speculative_tokens=0)
    assert answer["answer"] == plain.text
    assert answer["tokens"] == list(plain.decoded.tokens)
    assert "".join(piece["text"] for piece in answer["pieces"]) == plain.text
    assert all(each["drafted"] == 2 for each in answer["rounds"])
    monkeypatch.chdir(spec.home)
    named = spec("try", run_folder.name, "Name three colours.", "--k", "2", *SHORT, "--json")
    assert named.json["pieces"] == answer["pieces"], named.err
    shown = spec("try", run_folder / "speculator", "Name three colours.", "--k", "2", *SHORT)
    # Control characters, which a terminal would obey, are left out.
    assert shown.out.startswith(strip_control_codes(plain.text))
    assert f"{answer['tau']:.2f} tokens a pass, K = 2" in shown.out
    assert "\x1b" not in shown.out


def test_drafted_tokens_are_in_colour_on_a_terminal_only() -> None:
    """The first tokens of a round that were accepted are green; the verifier's own is not."""

    def printed(terminal: bool) -> str:
        out = io.StringIO()
        view = AnswerView(
            Console(
                file=out, force_terminal=terminal, theme=Theme(STYLES), color_system="standard" if terminal else "auto"
            ),
            lambda tokens: "".join(chr(token) for token in tokens),
        )
        view([ord("a")], 0)
        view([ord("b"), ord("c"), ord("d")], 2)
        return out.getvalue()

    assert printed(True) == "a\x1b[32mbc\x1b[0md"
    assert printed(False) == "abcd"


def test_a_character_of_several_tokens_is_shown_when_it_is_whole() -> None:
    """A tokenizer returns a replacement mark for half a character, which must not be printed."""
    encoded = "né!".encode()
    pieces = TokenText(lambda tokens: bytes(tokens).decode(errors="replace"))
    shown = [piece for byte in encoded for piece in pieces.add([byte], 1)]
    assert [piece.text for piece in shown] == ["n", "é", "!"]


def test_a_chat_keeps_its_history_until_it_is_told_to_forget(
    spec: Spec, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is answered on the conversation before it; /new forgets it, /quit and the end of the input leave."""
    asked: list[list[str]] = []

    def recorded(speculator, chat, **options):
        asked.append([message["content"] for message in chat if message["role"] == "user"])
        return decode(speculator, chat, **options)

    monkeypatch.setattr("speculators.api.decode", recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\nthree\n/quit\nfour\n"))
    outcome = spec("try", run_folder, *SHORT)
    assert outcome.code == 0, outcome.err
    assert asked == [["one"], ["one", "two"], ["three"]]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert spec("try", run_folder).code == 0


def test_ctrl_c_ends_an_answer_and_not_the_chat(spec: Spec, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not answered is forgotten; the next line is answered."""
    asked: list[int] = []

    def interrupted(speculator, chat, **options):
        asked.append(len(chat))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return decode(speculator, chat, **options)

    monkeypatch.setattr("speculators.api.decode", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    outcome = spec("try", run_folder, *SHORT)
    assert outcome.code == 0, outcome.err
    assert asked == [1, 1]
    assert "the question is forgotten" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json",), "--json: needs a prompt"),
        ((" ",), "PROMPT: is empty"),
        (("hi", "--temperature", "-1"), "must be a number from 0"),
    ],
)
def test_bad_usage_is_an_error_before_anything_is_loaded(
    spec: Spec, run_folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    """The exit code is 2, and no model was read."""
    outcome = spec("try", run_folder, *arguments)
    assert outcome.code == 2
    assert message in outcome.err
