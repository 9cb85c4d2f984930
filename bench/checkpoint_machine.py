"""What ``checkpoint.py`` measures of the machine: the disk, CPU seconds, memory, and what other programs used meanwhile."""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MOST_OTHERS = 0.5  # CPUs that others may use during a row
now = time.perf_counter
Row = dict[str, float]


def disk_rates(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Return what the disk writes (created, fsynced) and reads in bytes per second: O_DIRECT, 2 threads, 16 MiB blocks."""
    block, threads = 16 << 20, 2
    blocks = max(1, num_bytes // block // threads)
    buffers = [mmap.mmap(-1, block) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(os.urandom(1 << 20) * 16)

    def write(thread: int) -> None:
        file = os.open(folder / f"disk-{thread}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(file, 0, blocks * block)
        for i in range(blocks):
            assert os.pwrite(file, buffers[thread], i * block) == block
        os.fsync(file)
        os.close(file)

    def read(thread: int) -> None:
        file = os.open(folder / f"disk-{thread}", os.O_RDONLY | os.O_DIRECT)
        for i in range(blocks):
            assert os.preadv(file, [buffers[thread]], i * block) == block
        os.close(file)

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for work in (write, read):
            start = now()
            list(pool.map(work, range(threads)))
            rates.append(threads * blocks * block / (now() - start))
    for thread in range(threads):
        (folder / f"disk-{thread}").unlink()
    return rates[0], rates[1]


def processes() -> dict[int, tuple[int, float, float]]:
    """Return for each process its parent, its CPU seconds (in ticks) and those of its children that have ended."""
    tick, found = os.sysconf("SC_CLK_TCK"), {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            user, system, ended_user, ended_system = map(int, fields[11:15])
            found[int(name)] = int(fields[1]), (user + system) / tick, (ended_user + ended_system) / tick
    return found


def tree(found: dict[int, tuple[int, float, float]], root: int) -> list[int]:
    """Return ``root`` and all that descend from it."""
    members = [root]
    for member in members:
        members += [pid for pid, (parent, _, _) in found.items() if parent == member]
    return members


def cpu_seconds(found: dict[int, tuple[int, float, float]], members: Sequence[int]) -> float:
    """Return the CPU seconds of processes, threads and ended children included, from their own clocks."""
    total = 0.0
    for pid in members:
        try:
            total += time.clock_gettime((~pid << 3) | 2) + found[pid][2]  # the clock that clock_getcpuclockid(3) names
        except (OSError, KeyError):
            continue
    return total


def others_seconds() -> float:
    """Return the CPU seconds that were used by neither this benchmark nor the kernel's own threads, since the start."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting; stolen counts
    found = processes()
    kernel = sum(ticks for parent, ticks, _ in found.values() if parent == 2)  # pages are written back for who made them
    return busy - kernel - cpu_seconds(found, tree(found, os.getppid()))


class Meter:
    """CPU seconds of this process and its children, CPUs that others used and, if ``memory``, the peak of memory."""

    def __init__(self, memory: bool = False) -> None:
        self._memory = memory
        self.cpu = self.others = self.peak = 0.0

    def __enter__(self) -> Meter:
        self._began, self._stop, self._sampling_s = threading.Event(), threading.Event(), 0.0
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._others, self._start = others_seconds(), now()
        self._children_cpu = self._of_children()
        if self._memory:
            self._sampler.start()
            self._began.wait()  # the first look at all processes would slow down what is measured
        self._own_cpu = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu = time.process_time() - self._own_cpu
        self.cpu += self._of_children() - self._children_cpu
        self._stop.set()
        if self._memory:
            self._sampler.join()
            self.cpu -= self._sampling_s
        others, took = others_seconds() - self._others, now() - self._start
        self.others = max(0.0, others) / took

    def _of_children(self) -> float:
        found = processes()
        return found[os.getpid()][2] + cpu_seconds(found, tree(found, os.getpid())[1:])

    def _sample(self) -> None:
        looked = -math.inf
        while True:
            if now() - looked > 0.5:  # for new children; it takes milliseconds
                looked, family = now(), own_family(processes())
            self.peak = max(self.peak, memory_of(family))
            self._began.set()
            if self._stop.wait(0.01):
                break
        self._sampling_s = time.thread_time()


def own_family(found: dict[int, tuple[int, float, float]]) -> list[int]:
    """Return this process and its children. No grandchildren: forked ones share what they hold with their parent."""
    return [os.getpid(), *(pid for pid, (parent, _, _) in found.items() if parent == os.getpid())]


def memory_of(members: Sequence[int]) -> float:
    """Return the anonymous memory of processes, and the shared memory of that which maps most of it."""
    anonymous, shared = 0, [0]
    for pid in members:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        anonymous += int(sizes.get("RssAnon", 0)) * 1024
        shared.append(int(sizes.get("RssShmem", 0)) * 1024)
    return anonymous + max(shared)
