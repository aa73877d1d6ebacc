"""The mask is readable in colour, without colour and in a file; data cannot command the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.inspection.view import RenderedConversation, TextSpan
from speculators.report.console import STYLES
from speculators.report.data import conversation_text

SHOWN = RenderedConversation(
    id="c",
    tokens=6,
    supervised=3,
    cut=False,
    pieces=(
        TextSpan("<|user|>", False, True),
        TextSpan("Wh[bold]y?\n", False, False),
        TextSpan("Because\nof that", True, False),
        TextSpan("<|end|>", True, True),
        TextSpan("\n", False, False),
        TextSpan("So", True, False, "reasoning"),
        TextSpan("Rain", False, False, "tool results"),
    ),
)


def printed(*, terminal: bool, width: int = 80) -> str:
    out = io.StringIO()
    colours = "standard" if terminal else None
    Console(
        file=out, theme=Theme(STYLES), force_terminal=terminal, color_system=colours, width=width, highlight=False
    ).print(conversation_text(SHOWN))
    return out.getvalue()


def test_without_colour_the_supervised_text_stands_in_brackets():
    """The brackets include ends of turns; text that looks like markup or brackets stays as it is."""
    assert printed(terminal=False) == "<|user|>Wh[bold]y?\n⟦Because\nof that<|end|>⟧\n⟦So⟧Rain\n"


def test_on_a_terminal_supervised_text_is_underlined_and_coloured():
    """Special tokens, reasoning, calls and results have colours of their own, underlined where they are supervised."""
    shown = printed(terminal=True)
    assert "\x1b[4;32mBecause" in shown
    assert "\x1b[35m<|user|>" in shown
    assert "\x1b[1;4;35m<|end|>" in shown
    assert "\x1b[4;33mSo" in shown
    assert "\x1b[34mRain" in shown
    assert "Wh[bold]y?" in shown


@pytest.mark.parametrize("width", [20, 80, 140])
def test_any_width_shows_the_whole_text(width):
    """Wrapping loses no word."""
    assert printed(terminal=False, width=width).split() == printed(terminal=False, width=200).split()


def test_control_characters_are_shown_not_obeyed():
    """An escape sequence in a conversation is printed as its picture."""
    shown = RenderedConversation(
        id="c", tokens=1, supervised=0, cut=False, pieces=(TextSpan("a\x1b[31mb\x9bc\x07\td", False, False),)
    )
    assert conversation_text(shown).plain == "a␛[31mb�c␇\td"
