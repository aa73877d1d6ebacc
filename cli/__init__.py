"""The `spec` command: one file a verb, imported when it is called, so that help and the light verbs start at once."""

from __future__ import annotations

import argparse
import errno
import importlib
import keyword
import os
import sys
from collections.abc import Sequence

from speculators.errors import RecipeError, SpeculatorsError
from speculators.registry import near_miss

# A verb is a module of this package (dashes become underscores) with `add_arguments(parser)` and `run(options) -> int`.
VERBS = {
    "ls": "list recipes, algorithms and runs",
    "show": "show a recipe, and where each value comes from",
    "cp": "copy a recipe to edit",
    "validate": "check a recipe, without weights",
    "plan": "tell what would run, and what is done already",
    "data": "look at what a run would train on: mask, lengths, coverage, how on-policy",
    "diff": "tell what two recipes or runs differ in, and what follows",
    "run": "run a recipe, ending in the acceptance table",
    "reproduce": "make a run again from its lock, and tell what differs first",
    "lock": "check that the locks of recipes and runs still resolve",
    "bench": "measure a speculator's acceptance length and speed-up",
    "doctor": "examine a speculator: what is wrong with it, by measurement, and what to do",
    "export": "write a speculator as a server reads it, with the command that serves it",
    "import": "turn a published speculator into one of ours",
    "report": "write one HTML page about runs: curves, acceptance, plan, lock, differences",
    "new-algorithm": "write the skeleton of an algorithm of your own",
    "regenerate": "answer prompts with the verifier: on-policy data",
    "serve-states": "start a vLLM server that gives a recipe's hidden states",
}

# What follows `--` is for a program that the verb starts; argparse would take it for its own.
PASS_ON = ("serve-states",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code: 0 ok, 1 failed, 2 bad recipe or usage, 130 interrupted."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except SpeculatorsError as error:
        told = error.problems if isinstance(error, RecipeError) else (error,)
        print("\n".join(f"error: {one}" for one in told), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Any argument may be taken for a path, and any first look at it fails so.
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return RecipeError.exit_code
    except SystemExit as stop:  # argparse, after it said what is wrong
        return stop.code if isinstance(stop.code, int) else 2


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = "\n".join(f"  {name:{width}}  {summary}" for name, summary in VERBS.items())
        print(f"usage: spec VERB ...\n\nTrain and measure draft models for speculative decoding.\n\n{lines}\n")
        print("spec VERB --help tells more. Exit codes: 0 ok, 1 failed, 2 bad recipe or usage, 130 interrupted.")
        return 0
    if verb == "--version":
        from importlib import metadata

        print(metadata.version("spec-recipes"))
        return 0
    if verb not in VERBS:
        hint = near_miss(verb, list(VERBS)) or f"there are: {', '.join(VERBS)}"
        raise RecipeError(f"no command {verb!r} ({hint})")
    # "import" is Python's own word, and the module import_.
    file = verb.replace("-", "_") + ("_" if keyword.iskeyword(verb) else "")
    module = importlib.import_module(f"{__name__}.{file}")
    parser = argparse.ArgumentParser(prog=f"spec {verb}", description=module.__doc__, allow_abbrev=False)
    own = arguments[1:]
    if verb in PASS_ON:
        cut = own.index("--") if "--" in own else len(own)
        own, extra = own[:cut], own[cut + 1 :]
        parser.set_defaults(extra=extra)
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print the result and errors only")
    return int(module.run(parser.parse_args(own)))
