"""Answers a prompt with a speculator and its verifier; drafted tokens that were accepted are green.

The answer is the verifier's own, token for token. Without a prompt it is a small chat: /new forgets it, /quit leaves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import Problem, RecipeError, SpeculatorsError
from speculators.runs.places import find_speculator

from .common import RUN_HELP, count, natural, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help=f"{RUN_HELP}; or a folder with a speculator")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to answer (default: a chat)")
    parser.add_argument("--k", metavar="K", type=natural, help="tokens drafted per round; 0 drafts nothing")
    parser.add_argument("--temperature", metavar="T", type=_temperature, default=0.0, help="default: 0, greedy")
    parser.add_argument("--max-tokens", metavar="N", type=count, default=256, help="longest answer (default: 256)")
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help="of the sampling (default: 0)")
    text = "a verifier instead of the run's or the one that config.json names"
    parser.add_argument("--verifier", metavar="MODEL", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints the answer, or chats."""
    if options.json and options.prompt is None:
        raise RecipeError([Problem("--json", "needs a prompt", 'spec try RUN "Name three colours." --json')])
    if options.prompt is not None and not options.prompt.strip():
        raise RecipeError([Problem("PROMPT", "is empty", "leave it out for a chat")])
    # Before torch is imported, so that a wrong name is answered at once.
    find_speculator(options.checkpoint)
    from speculators.api import load_speculator

    speculator = load_speculator(options.checkpoint, verifier=options.verifier, quiet=options.quiet)
    speculator.k(options.k)
    if options.prompt is None:
        return _chat(speculator, options)
    answer, pieces = _answer(speculator, [{"role": "user", "content": options.prompt}], options)
    if options.json:
        rounds = [attrs.asdict(each) for each in answer.decoded.rounds]
        print_json(
            {
                "prompt": options.prompt,
                "answer": answer.text,
                "num_speculative_tokens": speculator.k(options.k),
                "temperature": options.temperature,
                "tau": answer.tau if rounds else None,
                "tokens": list(answer.decoded.tokens),
                "rounds": rounds,
                "pieces": [attrs.asdict(piece) for piece in pieces],
            }
        )
    return 0


def _answer(speculator: Any, chat: list[dict[str, str]], options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Decodes an answer and prints it as it comes; returns it with its pieces."""
    from speculators.api import decode
    from speculators.report.answer import AnswerView, answer_line
    from speculators.report.console import console

    places = speculator.engine.facts.max_position_embeddings
    if (length := len(speculator.tokens(chat))) >= places:
        message = f"the conversation has {length} tokens, and the verifier no more than {places} positions"
        raise SpeculatorsError(message, hint="shorten it; in a chat, /new forgets it")
    k, out = speculator.k(options.k), console()
    view = AnswerView(None if options.json else out, speculator.text)
    answer = decode(
        speculator,
        chat,
        max_new_tokens=min(options.max_tokens, places - length),
        num_speculative_tokens=k,
        temperature=options.temperature,
        # Another seed for each turn; the same conversation gives the same answers.
        seed=options.seed + len(chat) // 2,
        listen=view,
    )
    view.finish()
    if not (options.json or options.quiet):
        out.print(answer_line(answer.decoded, k))
    return answer, view.pieces


def _chat(speculator: Any, options: argparse.Namespace) -> int:
    """Answers line after line, each on the conversation before it, until /quit or the end of the input."""
    if sys.stdin.isatty() and not options.quiet:
        print("accepted drafts are green; /new forgets the conversation, /quit or Ctrl-D leaves")
    chat: list[dict[str, str]] = []
    while (line := _read(options)) is not None:
        if line == "/quit":
            break
        if line == "/new":
            chat.clear()
        if not line or line == "/new":
            continue
        asked = [*chat, {"role": "user", "content": line}]
        try:
            answer, _ = _answer(speculator, asked, options)
        except KeyboardInterrupt:
            # Ctrl-C ends this answer, and a second one at the prompt the chat; what was not answered is forgotten.
            print("\n(stopped; the question is forgotten)")
            continue
        except SpeculatorsError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        chat = [*asked, {"role": "assistant", "content": answer.text}]
    return 0


def _read(options: argparse.Namespace) -> str | None:
    """Reads one line; None at the end of the input (Ctrl-D)."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("" if options.quiet else "> ").strip()
    except EOFError:
        print()
        return None


def _temperature(text: str) -> float:
    """argparse type: a number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text!r}")
    return value
