"""Starts a vLLM server of a recipe's hidden states, for `data.hidden_states = "server"`; Ctrl-C stops it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from speculators.errors import Problem, RecipeError
from speculators.files.used import use

from .common import add_recipe, count, load_checked, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument(
        "--host", metavar="HOST", help="address to listen on (default: that of the first of data.server.endpoints)"
    )
    parser.add_argument("--port", metavar="PORT", type=count, help="port to listen on (default: likewise)")
    parser.add_argument(
        "--vllm", metavar="PROGRAM", default="vllm", help="the vllm program in its own environment (default: vllm)"
    )
    parser.add_argument("--print", action="store_true", help="only print the command (as JSON with --json)")
    parser.epilog = "What follows -- is passed on to vllm serve: -- --tensor-parallel-size 8"


def run(options: argparse.Namespace) -> int:
    """Runs the server; returns vLLM's exit code."""
    if options.json and not options.print:
        raise RecipeError(
            [Problem("--json", "needs --print: a running server has no result", "leave out --json, or add --print")]
        )
    options.nproc = 1
    recipe = load_checked(options)
    from speculators.pipeline.server_states import plan_server, serve_states
    from speculators.report.progress import RunView
    from speculators.runs.places import Places
    from speculators.servers.states_server import shell_line

    vllm = str(Path(options.vllm).absolute()) if os.sep in options.vllm else options.vllm
    with RunView(quiet=options.quiet) as view:
        settings, note = plan_server(
            recipe,
            places=Places(),
            progress=view,
            host=options.host,
            port=options.port,
            vllm=vllm,
            extra=tuple(options.extra),
        )
    command, environment = settings.command(), settings.environment(os.environ)
    if options.json:
        print_json({"command": command, "environment": environment, "folder": settings.folder})
        return 0
    if options.print:
        print(shell_line(command, environment))
        return 0
    if not options.quiet:
        layers = ", ".join(map(str, settings.layer_ids))
        print(f"the states of layers {layers} and of the last go to {settings.folder}", file=sys.stderr)
    if Path(settings.folder).is_relative_to(Places().verifiers):
        use(Path(settings.folder), recipe.name, recipe.verifier.model)
    return serve_states(settings, note)
