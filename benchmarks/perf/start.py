"""Measures how much processor time light verbs need to start, beside an interpreter that does nothing.

The bytecode is cached in a temporary folder, as an installed package's is: some machines write none, and then every
start compiles.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 15
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "spec --help": ("-m", "speculators.cli", "--help"),
    "spec validate quickstart": ("-m", "speculators.cli", "validate", "quickstart"),
}


def processor_seconds(arguments: tuple[str, ...], environment: dict[str, str]) -> float:
    """Runs the interpreter once and reads the processor time of it, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Prints the median of each command, and its ratio to the bare interpreter's; the commands take turns."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = folder
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for attempt in range(ROUNDS + 1):
            for name, arguments in COMMANDS.items():
                spent = processor_seconds(arguments, environment)
                if attempt:  # the first fills the cache
                    seconds[name].append(spent)
    bare = statistics.median(seconds["python -c pass"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:26} {median:.3f} s  {median / bare:.1f} x a bare interpreter")


if __name__ == "__main__":
    main()
