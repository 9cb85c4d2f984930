"""Processes that stay, so that a case on several ranks costs milliseconds instead of an import of torch."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 4
GROUP_SIZES = (2, 4)
START_SECONDS = 150.0
CASE_SECONDS = 60.0
STRAGGLER_SECONDS = 3.0  # what the other ranks get once one has failed: they hang in its collective


class Ranks:
    """Call functions on the first ``size`` of ``WORLD_SIZE`` processes joined by gloo.

    A case is a module-level function ``case(group, *args)``; it asserts by itself and returns what pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __call__(self, case: Callable[..., Any], *args: Any, size: int = 2, seconds: float = CASE_SECONDS) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes[:size]:
            pipe.send((case, args, size))
        answers = self._collect(size, seconds)
        if all(rank in answers and answers[rank][0] for rank in range(size)):
            return [answers[rank][1] for rank in range(size)]
        self.stop()
        said = (f"---- rank {rank} ----\n{answers.get(rank, (False, 'no answer'))[1]}" for rank in range(size))
        pytest.fail(f"{case.__name__}{args} on {size} ranks:\n" + "\n".join(said), pytrace=False)

    def _start(self) -> None:
        self.started += 1
        context = mp.get_context("forkserver")  # torch is imported once, and no rank inherits pytest's threads
        context.set_forkserver_preload(["torch", "torch.distributed"])
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            store = self.folder / f"store-{self.started}"
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        ready = self._collect(WORLD_SIZE, START_SECONDS)
        if len(ready) < WORLD_SIZE:
            self.stop()  # a late "ready" must not pass for an answer
            pytest.fail(f"only ranks {sorted(ready)} of {WORLD_SIZE} came up in {START_SECONDS} s", pytrace=False)

    def _collect(self, size: int, seconds: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < size and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([self.pipes[rank] for rank in range(size) if rank not in answers], left):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = self.pipes[rank].recv()
                except EOFError:
                    answers[rank] = (False, f"died with exit code {self.processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + STRAGGLER_SECONDS)
        return answers

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


def _serve(rank: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=CASE_SECONDS),
    )
    # Every rank takes part in making every group, also those that it is no member of.
    groups = {size: dist.new_group(list(range(size))) for size in GROUP_SIZES}
    pipe.send((True, None))
    while True:
        try:
            case, args, size = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((True, case(groups[size], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
