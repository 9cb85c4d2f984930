"""What ranks must know of each other between collectives: that one failed, and that all shall stop at the same step.

A thread on each rank looks at the job's key-value store once in a while. The step path reads one attribute.

Stopping together, without a collective per step:

1. any rank: ``request_stop`` (from a signal handler) sets a flag; its thread writes ``stop`` to the store.
2. all ranks, thread: on seeing ``stop``, close the gate: the main thread will not pass another `boundary`. Then write how
   many boundaries it has passed.
3. all ranks, thread: read everybody's count; the largest is where all stop. Open the gate.
4. all ranks, main thread: go on to that boundary, where ``boundary()`` returns True.

Main threads that wait at the gate can't be missed by a collective for long: the threads that answer never wait for them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

_PERIOD_S = 0.5


@dataclass(frozen=True)
class Failure:
    """What another rank failed with."""

    rank: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.kind}: {self.message}"


class RankMonitor:
    """One rank's view of the others' fate.

    Args:
        store: the job's store; a connection of its own is made from it. rank, world_size: of this process.
        name: separates the keys of several monitors over one store; the same on all ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str = "0") -> None:
        self._store = dist.PrefixStore(f"kenotron/{name}", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Condition()
        self._gate_closed = False
        self._passed = 0
        self._stop_at: int | None = None
        self._requested = False
        self._failure: Failure | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kenotron-ranks", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------- main thread

    def boundary(self) -> bool:
        """Pass a step boundary; ``True`` where all ranks stop. Waits only while a stop is being agreed on."""
        with self._lock:
            while self._gate_closed and self._failure is None and not self._finished.is_set():
                self._lock.wait(_PERIOD_S)
            if self._stop_at is not None and self._passed >= self._stop_at:
                return True
            self._passed += 1
            return False

    def request_stop(self) -> None:
        """Ask all ranks to stop; safe in a signal handler."""
        self._requested = True

    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks why this one goes away."""
        text = f"{self._rank}\n{type(error).__name__}\n{error}"
        try:
            self._store.compare_set("failure", "", text)
        except RuntimeError:  # the store went away with its rank: that one has told already
            return

    def has_failed(self) -> bool:
        """Return whether another rank is known to have failed."""
        return self._failure is not None

    def failure_elsewhere(self, patience_s: float = 3.0) -> Failure | None:
        """Return what another rank failed with, waiting a little for it to say so."""
        deadline = time.monotonic() + patience_s
        while self._failure is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        return self._failure

    def linger(self) -> None:
        """Give the other ranks the time to look once more."""
        time.sleep(2.5 * _PERIOD_S)

    def close(self) -> None:
        """Stop watching."""
        self._finished.set()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------------ thread

    def _watch(self) -> None:
        while not self._finished.wait(_PERIOD_S):
            try:
                self._look()
            except RuntimeError:  # the store's server is gone, and with it the job
                break
        with self._lock:
            self._gate_closed = False
            self._lock.notify_all()

    def _look(self) -> None:
        if self._failure is None and self._store.check(["failure"]):
            rank, kind, message = self._store.get("failure").decode().split("\n", 2)
            if int(rank) != self._rank:
                self._failure = Failure(int(rank), kind, message)
        if self._requested:
            self._store.set("stop", "1")
        if self._stop_at is None and self._store.check(["stop"]):
            self._agree()

    def _agree(self) -> None:
        with self._lock:
            self._gate_closed = True
            passed = self._passed
        self._store.set(f"passed/{self._rank}", str(passed))
        keys = [f"passed/{rank}" for rank in range(self._world_size)]
        while not self._store.check(keys):
            if self._finished.wait(0.02):
                return
            if self._store.check(["failure"]):  # who failed answers no more: let go, until it is gone for everybody
                with self._lock:
                    self._gate_closed = False
                    self._lock.notify_all()
                return
        stop_at = max(int(self._store.get(key)) for key in keys)
        with self._lock:
            self._stop_at, self._gate_closed = stop_at, False
            self._lock.notify_all()
