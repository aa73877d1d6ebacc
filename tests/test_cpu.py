"""A process shares the CPU: background threads start no teams, and threads sleep at waits while others compute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from speculators import cpu

TASKS = Path("/proc/self/task")
linux = pytest.mark.skipif(not TASKS.exists(), reason="reads Linux' /proc")


@pytest.fixture
def two_threads():
    """Lets torch compute with two threads, whose team exists when the test begins."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.zeros(2**20).add_(1)
    yield
    torch.set_num_threads(before)


def settled():
    """Counts this process's threads; one that has just ended is listed for a moment longer."""
    counts = []
    for _ in range(20):
        counts.append(len(list(TASKS.iterdir())))
        time.sleep(0.005)
    return min(counts)


def threads_after(work):
    """Counts the threads that a thread which does `work` leaves while it lives, beyond itself."""
    before, counted = settled(), []

    def run():
        work()
        torch.zeros(2**20).add_(1)
        counted.append(settled() - before - 1)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    return counted[0]


@linux
def test_a_thread_that_computes_alone_starts_no_team(two_threads):
    """One that does not say so starts a second thread, which is what slows the main thread down."""
    assert threads_after(cpu.compute_alone) == 0
    assert threads_after(lambda: None) == 1


def test_other_threads_keep_their_number_of_threads(two_threads):
    """torch remembers the last number that any thread set, for those that start later."""
    alone = Thread(target=cpu.compute_alone)
    alone.start()
    alone.join()
    counted = []
    later = Thread(target=lambda: counted.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counted == [2]
    assert torch.get_num_threads() == 2


@linux
def test_a_team_is_added_while_others_compute_and_removed_when_they_have_ended(two_threads, monkeypatch):
    """Seen from outside: one thread more while a neighbour uses a CPU, and none some looks after its end."""
    loads = iter([0.0, 0.9, 0.9, 0.2, *[0.0] * 100])
    monkeypatch.setattr(cpu, "_own_cpus", lambda: frozenset({0, 1}))
    monkeypatch.setattr(cpu, "EVERY", 0.01)
    monkeypatch.setattr(cpu.Load, "of_others", lambda _: next(loads))
    held = []
    start = cpu._idle_team

    def noted():
        release = start()
        held.append("held")
        return lambda: (release(), held.append("released"))

    monkeypatch.setattr(cpu, "_idle_team", noted)
    with cpu.sharing_the_cpu():
        until(lambda: held == ["held", "released"])
    assert held == ["held", "released"]


def test_cpus_that_this_process_leaves_to_others_do_not_make_it_busy(two_threads, monkeypatch):
    """The other processes of a launch use their own share of the machine, and no thread sleeps for that."""
    loads = iter([2.1, 2.1, 2.1])
    over = Event()

    def of_others(_):
        load = next(loads, None)
        if load is None:
            over.set()
        return load or 0.0

    monkeypatch.setattr(cpu, "EVERY", 0.01)
    monkeypatch.setattr(cpu.Load, "of_others", of_others)
    held = []
    monkeypatch.setattr(cpu, "_idle_team", lambda: held.append("held") or (lambda: None))
    load = cpu.Load(frozenset(), 0.0, 0.0, 0.0)
    cpu._watch(load, 2, over)
    assert held == []
    loads, over = iter([2.4]), Event()
    cpu._watch(load, 2, over)
    assert held == ["held"]


def until(condition):
    """Waits for a condition, ten seconds at most."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


@linux
def test_a_team_that_waits_raises_the_number_of_openmp_threads_above_that_of_cpus(two_threads):
    """libgomp counts the members of all teams but their first threads; more than its CPUs let every team sleep."""
    before = settled()
    release = cpu._idle_team()
    members = len(os.sched_getaffinity(0)) - torch.get_num_threads() + 2
    until(lambda: settled() == before + max(2, members))
    assert settled() == before + max(2, members)
    release()
    assert settled() == before


@linux
def test_the_load_of_others_counts_what_another_process_uses_and_not_what_this_one_does():
    """A neighbour that computes without pause shows; the time of this process's own work is taken off."""
    load = cpu.Load.begin()
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.6)
        with_neighbour = load.of_others()
        used = cpu._used(load.cpus)
        own = time.process_time()
    finally:
        neighbour.kill()
        neighbour.wait()
    # However busy the machine is, a process that wants a CPU gets a tenth of one.
    assert with_neighbour > 0.1
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert cpu._used(load.cpus) - used >= 0.9 * (time.process_time() - own)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_is_read_in_both_of_linux_forms(tmp_path, files, expected):
    """cgroup v2 has one file, v1 two; without either there is no limit."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert cpu._quota(tmp_path) == expected


def test_a_quota_below_the_cpus_limits_the_threads_unless_the_user_has_set_them(two_threads, monkeypatch):
    """More threads than the quota has CPUs would be stopped by the kernel for most of each tenth of a second."""
    monkeypatch.setattr(cpu, "_quota", lambda: 1.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with cpu.sharing_the_cpu():
        assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    with cpu.sharing_the_cpu():
        assert torch.get_num_threads() == 1
