"""Proves that a change of the code changes no result: the same recipes, before and after, to the bit.

    python benchmarks/same_bits.py record before.json     # on the old commit
    python benchmarks/same_bits.py record after.json      # on the new one, the same machine and packages
    python benchmarks/same_bits.py compare before.json after.json

It calls only the command line and reads only what servers read, so one copy of this file serves both commits: run it
from any checkout with the `spec` of that checkout on the path (or `--python`, its interpreter).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# A small benchmark is enough: its numbers follow from the weights, and these are compared whole.
SHORT = (
    "schedule.max_steps=20",
    'benchmark.suites=[{name="quickstart",take=8}]',
    "benchmark.max_new_tokens=32",
    "benchmark.num_speculative_tokens=[3]",
)
ALGORITHMS = ("", "_eagle1", "_peagle", "_dflash", "_dspark", "_mtp", "_medusa")
RUNS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    **{f"quickstart{name}": SHORT for name in ALGORITHMS},
    "quickstart_short": (),
}
# Parts of the names of benchmark numbers that depend on the clock.
TIMED = ("seconds", "speed", "ms", "cost", "tokens_per", "overhead", "created", "device", "code", "version")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Maps the path of each number in a JSON document to the number, leaving out those that depend on the clock."""
    if isinstance(value, dict):
        parts = [numbers(item, f"{path}.{key}") for key, item in value.items() if not any(t in key for t in TIMED)]
    elif isinstance(value, list):
        parts = [numbers(item, f"{path}[{index}]") for index, item in enumerate(value)]
    else:
        return {path: value} if isinstance(value, (int, float)) else {}
    return {key: number for part in parts for key, number in part.items()}


def losses(run: Path) -> list[float]:
    """Reads the loss of every update from events.jsonl."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["loss"] for event in events if event["event"] == "StepEvent"]


def record(out: Path, python: str, only: list[str]) -> None:
    """Runs the recipes with one checkout's interpreter and records their results, saving them after each."""
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as folder:
        for name in only or RUNS:
            runs = Path(folder) / name
            options = [part for value in RUNS[name] for part in ("--set", value)]
            command = [python, "-m", "speculators.cli", "run", name, "--runs", str(runs), "--quiet", *options]
            print(f"+ {' '.join(command)}", flush=True)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (run,) = runs.iterdir()
            (bench,) = (run / "bench").glob("*.json")
            results[name] = {
                "weights": sha256(run / "speculator" / "model.safetensors"),
                "losses": losses(run),
                "bench": numbers(json.loads(bench.read_text(encoding="utf-8"))),
            }
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    """Prints what differs and returns the exit code: 0 if nothing does."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    differing = 0
    for name in sorted({*old, *new} - {"machine"}):
        if name not in old or name not in new:
            print(f"{name}: only in {before if name in old else after}")
            differing += 1
            continue
        a, b = old[name], new[name]
        gone, changed = sorted(set(a["bench"]) - set(b["bench"])), 0
        for key in sorted(set(a["bench"]) & set(b["bench"])):
            if a["bench"][key] != b["bench"][key]:
                print(f"  {name}{key}: {a['bench'][key]} -> {b['bench'][key]}")
                changed += 1
        same = (a["weights"] == b["weights"], a["losses"] == b["losses"], not changed and not gone)
        differing += not all(same)
        verdict = ["differ", "same"]
        print(
            f"{name:20} weights {verdict[same[0]]} ({b['weights'][:12]})  "
            f"{len(b['losses'])} losses {verdict[same[1]]}  "
            f"{len(a['bench'])} benchmark numbers {verdict[same[2]]}"
            + (f" ({len(gone)} missing, as {gone[0]})" if gone else "")
        )
    print("no result differs" if not differing else f"{differing} recipes differ")
    return min(differing, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("recipes", nargs="*", help="only these recipes (all of them)")
    recording.add_argument("--python", default=sys.executable)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    record(args.out, args.python, args.recipes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
