"""Lists what the cache holds, with sizes and the recipes and models it serves, or removes some of it.

Everything in the cache can be made again, at the price of time. What a running process uses is never removed.
"""

from __future__ import annotations

import argparse

from speculators.errors import Problem, RecipeError
from speculators.files.disk import cache_folder, size_text
from speculators.runs.cache import Choice, Pruned, cache_entries, chosen, remove

from .common import add_runs, add_yes, agreed, count, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("action", choices=("list", "prune"), nargs="?", default="list", help="(default: list)")
    text = "with prune: a recipe, a model, an entry such as states/0123456789abcdef, or a kind such as states"
    parser.add_argument("names", metavar="WHAT", nargs="*", help=text)
    text = "with prune: only what nobody used for N days"
    parser.add_argument("--unused-days", metavar="N", type=count, help=text)
    parser.add_argument("--all", action="store_true", help="with prune: everything")
    parser.add_argument("--dry-run", action="store_true", help="with prune: only say what would be removed")
    add_yes(parser)
    add_runs(parser)


def run(options: argparse.Namespace) -> int:
    """Lists or prunes."""
    cache = cache_folder()
    entries = cache_entries(cache, options.runs)
    if options.action == "prune":
        return _prune(chosen(entries, _choice(options)), options)
    if options.names:
        raise RecipeError(
            [Problem("", "list takes no WHAT", "spec cache prune WHAT --dry-run shows what it stands for")]
        )
    total = sum(entry.bytes for entry in entries)
    if options.json:
        print_json({"folder": str(cache), "bytes": total, "entries": [entry.to_json() for entry in entries]})
        return 0
    from speculators.report.cache import cache_table
    from speculators.report.console import console

    if entries:
        console().print(cache_table(entries))
    print(f"{cache}: {size_text(total)} in {len(entries)} entries")
    return 0


def _choice(options: argparse.Namespace) -> Choice:
    if not (options.names or options.unused_days or options.all):
        hint = "name recipes, models or entries, or give --unused-days N or --all"
        raise RecipeError([Problem("", "prune needs to know what to remove", hint)])
    if options.names and options.all:
        raise RecipeError([Problem("--all", "removes everything: leave out the names, or --all")])
    return Choice(names=tuple(options.names), unused_days=float(options.unused_days or 0))


def _prune(picked: Pruned, options: argparse.Namespace) -> int:
    """Removes the entries, after a question; returns 0 where nothing matches, too: there is nothing left to remove."""
    freed = sum(entry.bytes for entry in picked.removed)
    if not options.json and not options.quiet:
        for entry in picked.removed:
            print(f"{entry.name}  {size_text(entry.bytes)}  {', '.join(entry.users)}")
        for entry in picked.in_use:
            print(f"{entry.name}  kept: a running process uses it")
    if not options.dry_run and picked.removed:
        agreed(options, f"remove {len(picked.removed)} entries, {size_text(freed)}?")
        late = remove(picked.removed)
        picked = Pruned(removed=late.removed, in_use=(*picked.in_use, *late.in_use))
    freed = sum(entry.bytes for entry in picked.removed)
    if options.json:
        names = {"removed": [each.name for each in picked.removed], "in_use": [each.name for each in picked.in_use]}
        print_json({**names, "bytes": freed, "dry_run": options.dry_run})
    else:
        print(f"{'would free' if options.dry_run else 'freed'} {size_text(freed)}")
    return 0
