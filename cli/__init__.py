"""The `spec` command: one file per verb, imported when it is called, so that help and the light verbs start at once."""

from __future__ import annotations

import argparse
import errno
import importlib
import keyword
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from speculators.errors import Problem, RecipeError, SpeculatorsError
from speculators.registry import near_miss

from .streams import UntilClosed, print_problems

# Every verb with its line of help. A verb is a module of this package (dashes become underscores) that has
# `add_arguments(parser)` and `run(options) -> int`.
GROUPS = {
    "Train": {
        "ls": "list recipes, algorithms and runs",
        "init": "write a recipe for a verifier of your own",
        "cp": "copy a recipe to a file of your own",
        "validate": "check a recipe without loading a model",
        "plan": "show what a run would do, which stages are done, and what it would cost",
        "data": "inspect the training data: loss mask, lengths, vocabulary coverage, leaks",
        "regenerate": "let the verifier answer prompts, for on-policy training data",
        "serve-states": "start a vLLM server that computes a recipe's hidden states",
        "run": "run a recipe, from its data to the acceptance table",
    },
    "Clean up": {
        "rm": "remove runs",
        "cache": "list what the cache holds, or remove some of it",
    },
    "Measure": {
        "bench": "measure a speculator's acceptance length and speed-up",
        "tune": "find the number of tokens to draft per round, here or for servers under load",
        "report": "write an HTML page about one or more runs",
        "ablate": "compare variants of a recipe over seeds, with intervals",
    },
    "Understand": {
        "show": "show a recipe, and where each value comes from",
        "diff": "compare two recipes or runs: what changed, and what that invalidates",
        "doctor": "find out what is wrong with a speculator, and how to mend it",
        "reproduce": "repeat a run from its lock and name the first difference",
        "lock": "check that recipes and runs still mean what their locks say",
    },
    "Serve": {
        "try": "answer a prompt, or chat, with the drafted tokens in colour",
        "export": "write a speculator for vLLM, SGLang or the hub, with the command that serves it",
        "import": "convert a published speculator, to measure or train it here",
    },
    "Extend": {
        "new-algorithm": "create an algorithm of your own that trains and passes its tests",
        "completion": "print the completion script for bash, zsh or fish",
    },
}
VERBS = {verb: summary for verbs in GROUPS.values() for verb, summary in verbs.items()}

# Command lines for the end of each verb's help; a test parses them.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "ls": ("spec ls", "spec ls --long --runs /data/runs"),
    "init": (
        "spec init ./my-model --data ./chats.jsonl",
        "spec init owner/model --verifier-config config.json --gpus 8xH100-80GB",
    ),
    "cp": ("spec cp quickstart ./mine.toml",),
    "validate": ("spec validate ./mine.toml", "spec validate quickstart ./mine.toml --set seed=1"),
    "plan": ("spec plan quickstart", "spec plan ./mine.toml --gpus 8xH100-80GB"),
    "data": ("spec data ./mine.toml --show 3",),
    "regenerate": (
        "spec regenerate ./mine.toml prompts.jsonl --out answers.jsonl",
        "spec regenerate ./mine.toml --out answers.jsonl --endpoint http://127.0.0.1:8000",
    ),
    "serve-states": ("spec serve-states ./mine.toml --port 8100",),
    "run": ("spec run quickstart_short", "spec run ./mine.toml --nproc 8 --set seed=1 --name second"),
    "rm": ("spec rm runs/NAME", "spec rm NAME OTHER --dry-run"),
    "cache": ("spec cache", "spec cache prune quickstart --dry-run", "spec cache prune --unused-days 30 --yes"),
    "bench": (
        "spec bench runs/NAME --k 3 --k 5",
        "spec bench A B C --against ngram --temperature 0 --temperature 1 --latex",
        "spec bench NAME --engine vllm --endpoint http://127.0.0.1:8000",
    ),
    "tune": (
        "spec tune runs/NAME --k-max 7",
        "spec tune NAME --endpoint http://gpu:8000 --baseline-endpoint http://gpu:8001",
    ),
    "report": ("spec report runs/NAME", "spec report A B C --out three.html"),
    "ablate": ("spec ablate quickstart --plan", "spec ablate ./mine.toml --seeds 0 1 2 3 4"),
    "show": ("spec show quickstart", "spec show ./mine.toml --why schedule.optimizer.lr"),
    "diff": ("spec diff quickstart ./mine.toml", "spec diff A B", "spec diff HEAD~1:mine.toml mine.toml --md"),
    "doctor": ("spec doctor NAME --quick", "spec doctor ./speculator --verifier ./qwen3 --prompts mine.jsonl"),
    "reproduce": ("spec reproduce runs/NAME --until prepare",),
    "lock": ("spec lock --check", "spec lock --check runs/NAME"),
    "try": ('spec try runs/NAME "Name three colours."', "spec try NAME --temperature 0.7"),
    "export": ("spec export runs/NAME --to vllm", "spec export NAME --to sglang --k 5"),
    "import": ("spec import ./checkpoint --verifier meta-llama/Llama-3.1-8B-Instruct",),
    "new-algorithm": ("spec new-algorithm my_draft",),
    "completion": ("spec completion bash",),
}

# For these verbs, everything after `--` goes to the program that they start; argparse would take it for its own.
PASS_ON = ("serve-states",)


class Parser(argparse.ArgumentParser):
    """The parser of one verb: its help ends with examples, and bad usage is an error like any other."""

    verb = ""

    def format_help(self) -> str:
        """Formats the help."""
        examples = "".join(f"  {line}\n" for line in EXAMPLES[self.verb])
        return f"{super().format_help()}\nexamples:\n{examples}"

    def error(self, message: str) -> NoReturn:
        """Raises RecipeError instead of exiting, so that `--json` can report it."""
        raise RecipeError([Problem("", message, f"{self.prog} --help describes the arguments")])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code: 0 ok, 1 failed, 2 bad recipe or usage, 130 interrupted.

    With `--json` an error, too, is one object on stdout: {"errors": [{file, line, path, message, hint}]}.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with UntilClosed.both():
        code = _reported(arguments)
        sys.stdout.flush()
    return code


def _reported(arguments: list[str]) -> int:
    """Runs a command line, reporting its errors."""
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        return _dispatch(arguments)
    except SpeculatorsError as error:
        if isinstance(error, RecipeError):
            lines = [str(problem) for problem in error.problems]
        else:
            lines = [str(error)]
        print_problems(error.problems, lines, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Any argument may be taken for a path, and the first look at one that is too long fails like this.
        problem = Problem("", f"{error.filename}: {error.strerror}")
        print_problems([problem], [str(problem)], as_json=as_json)
        return RecipeError.exit_code
    except SystemExit as stop:  # argparse, after it has printed the help
        return stop.code if isinstance(stop.code, int) else 2


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        from .version import print_version

        return print_version()
    if verb not in VERBS:
        hint = near_miss(verb, list(VERBS)) or f"available: {', '.join(VERBS)}"
        raise RecipeError(f"no command {verb!r} ({hint})")
    module, parser = verb_parser(verb)
    own = arguments[1:]
    if verb in PASS_ON:
        cut = own.index("--") if "--" in own else len(own)
        own, extra = own[:cut], own[cut + 1 :]
        parser.set_defaults(extra=extra)
    return int(module.run(parser.parse_args(own)))


def verb_parser(verb: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """Imports a verb and builds its parser, with the options that all verbs have."""
    # "import" is a keyword of Python, so that module is called import_.
    file = verb.replace("-", "_") + ("_" if keyword.iskeyword(verb) else "")
    module = importlib.import_module(f"{__name__}.{file}")
    parser = Parser(prog=f"spec {verb}", description=module.__doc__, allow_abbrev=False)
    parser.verb = verb
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print only the result and errors")
    return module, parser


def _help() -> str:
    width = max(map(len, VERBS))
    lines = ["usage: spec VERB ...", "", "Train and measure draft models for speculative decoding."]
    for group, verbs in GROUPS.items():
        lines += ["", group, *(f"  {verb:{width}}  {summary}" for verb, summary in verbs.items())]
    lines += [
        "",
        "Start with: spec run quickstart_short",
        "spec VERB --help describes a verb; spec --version prints versions, commit and device.",
        "Exit codes: 0 ok, 1 failed, 2 bad recipe or usage, 130 interrupted.",
    ]
    return "\n".join(lines)
