"""Shares the CPU with other processes: limits the threads that compute, and lets them sleep while they wait.

torch computes on a CPU with teams of OpenMP threads. A thread that has finished its share of an operation waits for the
others, thousands of times in each update. With libgomp, the library of torch's Linux packages, it spins for a few
milliseconds, which is fastest as long as every thread has a CPU. If another process needs one, the spinning threads
keep it from the thread that they wait for, and an update takes ten times as long. While a process has more OpenMP
threads than CPUs, however, libgomp lets waiting threads sleep. Both ways give the same bits. Nothing here affects other
libraries.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import attrs
import torch

# Seconds between two readings of the load.
EVERY = 1.0
# CPUs that other processes used since the last reading, beyond those that this one leaves to them: the machine is busy
# from the first value on, idle below the second.
BUSY, IDLE = 0.3, 0.1
# Idle readings in a row before waiting threads spin again.
CALM = 5
# Elements of a tensor large enough for torch to share an operation on it among threads.
_SHARED = 2**17


def usable_cpus() -> int:
    """Counts the CPUs that this process may use: those of its affinity, or fewer if its container has a quota."""
    allowed = len(_own_cpus()) or os.cpu_count() or 1
    quotas = [quota for quota in (_quota(), float(allowed)) if quota is not None]
    return max(1, int(min(quotas)))


def _own_cpus() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Reads the control group's limit in CPUs; None if there is none (cgroup v2, then v1)."""
    try:
        limit, period = (root / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu/cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        except OSError:
            return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def compute_alone() -> None:
    """Makes the calling thread compute without a team of its own; for threads that work beside the main thread.

    With its team, the process would have more OpenMP threads than CPUs, and the main thread's team would sleep at each
    wait: training took 1.2 times as long (benchmarks/RESULTS.md, "A busy machine").
    """
    _with_team_of(1)


def _with_team_of(count: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    # torch also applies the count to threads that start later. A thread without work of its own restores that.
    other = Thread(target=torch.set_num_threads, args=(before,))
    other.start()
    other.join()


@contextmanager
def sharing_the_cpu() -> Iterator[None]:
    """Computes with at most one thread per usable CPU, and lets waiting threads sleep while other processes are busy.

    Others are busy when they use a good part of this process's CPUs; where the system does not report that, threads
    spin as usual. OMP_NUM_THREADS overrides the number of threads. Works as a decorator, too.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cpus():
        torch.set_num_threads(usable_cpus())
    load = Load.begin() if torch.get_num_threads() > 1 else None
    if load is None:
        yield
        return
    over = Event()
    # CPUs that this process leaves to others, such as the other processes of its launch.
    spare = max(0, len(_own_cpus()) - torch.get_num_threads())
    watching = Thread(target=_watch, args=(load, spare, over), name="load", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _watch(load: Load, spare: int, over: Event) -> None:
    """Adds a team of threads while the machine is busy, and removes it when it has been idle for a while."""
    release: Callable[[], None] | None = None
    calm = 0
    while not over.wait(EVERY):
        others = load.of_others() - spare
        calm = calm + 1 if others < IDLE else 0
        if release is None and others >= BUSY:
            release = _idle_team()
        elif release is not None and calm >= CALM:
            release()
            release = None
    if release is not None:
        release()


def _idle_team() -> Callable[[], None]:
    """Starts an idle team, so that there are more OpenMP threads than CPUs; returns a function that ends it."""
    over, count = Event(), max(2, len(_own_cpus()) - torch.get_num_threads() + 2)

    def stay() -> None:
        _with_team_of(count)
        torch.zeros(_SHARED * count).add_(1)
        over.wait()

    team = Thread(target=stay, name="idle-team", daemon=True)
    team.start()

    def release() -> None:
        over.set()
        team.join()

    return release


@attrs.define(eq=False)
class Load:
    """The load that other processes put on this process's CPUs.

    Attributes:
        cpus: the lines of /proc/stat to add up.
        at, used, own: the clock, all processes' time and this one's at the last reading, in seconds.
    """

    cpus: frozenset[str]
    at: float
    used: float
    own: float

    @classmethod
    def begin(cls) -> Load | None:
        """Takes the first reading; None where the system does not report the load."""
        cpus = frozenset(f"cpu{number}" for number in _own_cpus())
        try:
            return cls(cpus, time.monotonic(), _used(cpus), time.process_time())
        except OSError:
            return None

    def of_others(self) -> float:
        """Takes a reading; returns the CPUs that other processes used on average since the last one."""
        before = (self.at, self.used, self.own)
        self.at, self.used, self.own = time.monotonic(), _used(self.cpus), time.process_time()
        seconds, used, own = (now - then for now, then in zip((self.at, self.used, self.own), before, strict=True))
        return (used - own) / seconds


def _used(cpus: frozenset[str]) -> float:
    """Adds up the seconds in which CPUs were in use, or taken by another virtual machine on the same hardware."""
    lines = (line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines())
    # user, nice, system, idle, iowait, irq, softirq, steal; the guests' times after these are part of the first two.
    ticks = sum(int(line[at]) for line in lines if line[0] in cpus for at in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK")
