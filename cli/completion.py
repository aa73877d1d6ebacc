"""Prints a script that completes `spec` in your shell: verbs, options, recipes, runs, suites, keys, algorithms.

bash:  eval "$(spec completion bash)"   in ~/.bashrc
zsh:   eval "$(spec completion zsh)"    in ~/.zshrc, after compinit
fish:  spec completion fish | source    in ~/.config/fish/config.fish
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from speculators.config import CONFIGS
from speculators.errors import RecipeError, SpeculatorsError
from speculators.recipe.catalog import recipe_names, suite_names
from speculators.recipe.values import flatten, known_paths
from speculators.runs.places import RUNS, run_folders
from speculators.runs.recipes import load_any

from . import PASS_ON, VERBS, verb_parser
from .common import print_json

# Each script asks `spec completion --candidates LINE`, so that it never goes stale; without candidates, the shell
# completes file names. In bash a word ends at "=", so only the text behind it is replaced.
SCRIPTS = {
    "bash": r"""_spec() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=($("${COMP_WORDS[0]}" completion --candidates "$line" 2>/dev/null))
    local current="${line##* }"
    if [[ $current == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*=}"}"}")
    fi
    COMPREPLY=("${COMPREPLY[@]//\"/\\\"}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _spec spec""",
    "zsh": r"""_spec() {
    local -a candidates
    candidates=("${(@f)$("$words[1]" completion --candidates "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${candidates[1]}" ]]; then
        [[ "${candidates[1]}" == *= ]] && compadd -U -S '' -- $candidates || compadd -U -- $candidates
    else
        _files
    fi
}
compdef _spec spec""",
    "fish": r"""complete -c spec -n __fish_use_subcommand -f
complete -c spec -a '(spec completion --candidates (commandline -cp | string collect) 2>/dev/null)'""",
}
STAGES = ("verifier", "prepare", "capture", "train", "bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", metavar="SHELL", nargs="?", choices=sorted(SCRIPTS), help="bash, zsh or fish")
    parser.add_argument("--candidates", metavar="LINE", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Prints the script of a shell, or for the script the tokens that may end a line."""
    if options.candidates is not None:
        tokens = candidates(options.candidates)
        print_json(tokens) if options.json else print("\n".join(tokens))
    elif options.shell is None:
        raise RecipeError(f"name a shell: {', '.join(SCRIPTS)}")
    elif options.json:
        print_json({"shell": options.shell, "script": SCRIPTS[options.shell]})
    else:
        print(SCRIPTS[options.shell])
    return 0


def candidates(line: str) -> list[str]:
    """Lists completions of the last word of a command line; [] if that is a file, or anything."""
    try:
        tokens = shlex.split(line)
    except ValueError:  # a quote is still open
        tokens = line.split()
    if line[-1:].isspace():
        tokens.append("")
    _program, *before, current = tokens if len(tokens) > 1 else ["spec", ""]
    try:
        options = _after(before, current)
    except SpeculatorsError:
        return []
    # Nobody types the quotes of a TOML text, and the shell must keep them.
    return [each for each in options if each.replace('"', "").startswith(current.replace('"', ""))]


def _after(before: Sequence[str], current: str) -> Sequence[str]:
    if not before:
        return [*VERBS, "--help", "--version"]
    verb, *arguments = before
    if verb not in VERBS or (verb in PASS_ON and "--" in arguments):
        return []
    # argparse has no public list of what a parser takes.
    actions = verb_parser(verb)[1]._actions
    by_option = {option: action for action in actions for option in action.option_strings}
    positionals = [action for action in actions if not action.option_strings]
    free: list[str] = []
    takes_value: argparse.Action | None = None
    for word in arguments:
        if takes_value is not None:
            takes_value = None
        elif word in by_option:
            takes_value = by_option[word] if by_option[word].nargs != 0 else None
        else:
            free.append(word)
    if takes_value is not None:
        return _values(takes_value, free)
    if current.startswith("-"):
        return sorted(option for option in by_option if option.startswith("--"))
    if not positionals:
        return []
    action = positionals[min(len(free), len(positionals) - 1)]
    return _values(action, free) if len(free) < len(positionals) or action.nargs in ("*", "+") else []


def _values(action: argparse.Action, free: Sequence[str]) -> Sequence[str]:
    """What an argument takes, by its choices or its metavar.

    Args:
        free: the arguments before it that are not options; the first names the recipe.
    """
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.metavar == "RUN":
        return _runs()
    if action.metavar in ("RECIPE", "WHAT", "A", "B"):
        return [*recipe_names(), *_runs()]
    if action.metavar == "KEY":
        return _keys(free)
    if action.metavar == "KEY=VALUE":
        texts = [f'algorithm.name="{name}"' for name in CONFIGS.names()]
        return [*(f"{key}=" for key in _keys(free) if key != "algorithm.name"), *texts]
    if action.metavar == "STAGE":
        return STAGES
    return suite_names() if action.dest == "suite" else []


def _runs() -> list[str]:
    return [run.name for run in run_folders(RUNS)]


def _keys(free: Sequence[str]) -> list[str]:
    """The keys of the recipe on the command line, or all that any recipe has."""
    try:
        return list(flatten(load_any(free[0])[0])) if free else known_paths(None)
    except SpeculatorsError:
        return known_paths(None)
