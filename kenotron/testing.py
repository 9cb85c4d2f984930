"""A pool of local processes that run functions as the ranks of a job, again and again, without paying for imports twice.

For tests and benchmarks of distributed code on one machine:

    with RankPool(4) as pool:
        losses = pool.run(train, 4, settings)        # train(settings) runs on 4 ranks; a list of 4 results

Each run sees the environment that ``torchrun`` makes (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` …) with a port of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip

#: Workers are replaced once one has more threads. What sharded tensors leave in torch's caches keeps a thread of gloo for each
#: process group, which wakes a hundred times a second: with some thousand of them nothing else runs.
_MOST_THREADS = 128


class RanksFailedError(RuntimeError):
    """A function failed on some rank; the message holds every rank's traceback."""


class RankPool:
    """Up to ``size`` processes that stay alive between runs. A failure ends them all; the next run starts new ones.

    Args:
        size: the most ranks that a run may have. threads: torch's threads in each.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        self._size = size
        self._threads = threads
        self._workers: list[_Worker] = []
        _pools.add(self)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Run ``function(*args, **kwargs)`` on ``num_ranks`` ranks.

        Returns:
            What each rank returned, by rank.

        Raises:
            RanksFailedError: a rank raised, died or took longer than ``timeout_s``.
        """
        if num_ranks > self._size:
            raise ValueError(f"num_ranks={num_ranks}, but this pool has {self._size} processes.")
        while len(self._workers) < num_ranks:
            self._workers.append(_start_worker(self._threads))
        port = _free_port()
        pipes = [worker.pipe for worker in self._workers[:num_ranks]]
        for rank, pipe in enumerate(pipes):
            pipe.send((_environment(rank, num_ranks, port), function, args, kwargs))
        results = _collect(pipes, timeout_s)
        failures = {rank: text for rank, (ok, text) in enumerate(results) if not ok}
        if failures:
            self.close()
            texts = "\n".join(f"--- rank {rank} of {num_ranks} ---\n{text}" for rank, text in failures.items())
            raise RanksFailedError(f"{function.__name__} failed on ranks {sorted(failures)}:\n{texts}")
        if any(worker.num_threads() > _MOST_THREADS for worker in self._workers):
            self.close()
        return [value for _, value in results]

    def close(self) -> None:
        """End all processes. Never some of them: the others would change their ranks, and torch caches what a rank holds."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []


_pools: weakref.WeakSet[RankPool] = weakref.WeakSet()


@atexit.register  # before multiprocessing waits for them
def close_pools() -> None:
    """End the processes of all pools: a pool that is used again starts new ones."""
    for pool in list(_pools):
        pool.close()


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def num_threads(self) -> int:
        """Return how many threads the process has; 0 where the system does not tell."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _start_worker(threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # No daemon: those may not have children, and data loaders want workers.
    process = context.Process(target=_serve, args=(theirs, threads))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            environment, function, args, kwargs = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            reply = True, function(*args, **kwargs)
        except BaseException:
            reply = False, traceback.format_exc()
        pipe.send(reply)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in _VARIABLES:
            os.environ.pop(name, None)
        gc.collect()


def _die_with_parent(parent: int) -> None:
    """A parent that was killed takes nobody along; ranks would wait for each other for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _collect(pipes: list[Connection], timeout_s: float) -> list[tuple[bool, Any]]:
    """Wait for all ranks; after the first failure the others have a few seconds to fail, too."""
    results: dict[Connection, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                results[pipe] = pipe.recv()
            except (EOFError, OSError):
                results[pipe] = False, "the process died"
            if not results[pipe][0]:
                deadline = min(deadline, time.monotonic() + 10.0)
    return [results.get(pipe, (False, "did not finish in time")) for pipe in pipes]


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    values = (rank, rank, num_ranks, num_ranks, 0, "127.0.0.1", port, "kenotron-pool")
    return {name: str(value) for name, value in zip(_VARIABLES, values, strict=True)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
