"""What ranks must know of each other between collectives: that one failed or died, and that all shall stop at the same step.

A thread on each rank looks at the job's key-value store once in a while, and learns at once when a process ends
(``peers.py``). The step path reads one attribute.

Stopping together, without a collective per step:

1. any rank: ``request_stop`` (from a signal handler) sets a flag; its thread writes ``stop`` to the store.
2. all ranks, thread: on seeing ``stop``, close the gate: the main thread will not pass another `boundary`. Then write how
   many boundaries it has passed.
3. all ranks, thread: read everybody's count; the largest is where all stop. Open the gate.
4. all ranks, main thread: go on to that boundary, where ``boundary()`` returns True.

Main threads that wait at the gate can't be missed by a collective for long: the threads that answer never wait for them.

A main thread that waits for a dead rank where torch has no limit of time, or one of half an hour, is not woken by an error.
So its process is ended, some time after the failure, unless it has noticed by then. The same where ranks wait for each other in
different collectives: what knows of these says so (`RankMonitor.who_parted`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from kenotron.peers import Peers

_PERIOD_S = 0.5
_DIED, _PARTED, _TOLD = "ProcessEnded", "RanksPartedError", ""
#: How long a main thread may take to notice a failure: of a process that is gone; of ranks that wait for different things,
#: which none of them notices; of one that has told, and may be working.
_PATIENCE_S = {_DIED: 15.0, _PARTED: 1.0, _TOLD: 60.0}


@dataclass(frozen=True)
class Failure:
    """What another rank failed with."""

    rank: int
    kind: str
    message: str

    @property
    def is_death(self) -> bool:
        """Whether its process has ended without a word."""
        return self.kind == _DIED

    @property
    def patience_s(self) -> float:
        """How long the main thread of another rank may take to notice it."""
        return _PATIENCE_S.get(self.kind, _PATIENCE_S[_TOLD])

    def __str__(self) -> str:
        if self.kind in _PATIENCE_S:
            return f"rank {self.rank} {self.message}"
        return f"rank {self.rank} failed: {self.kind}: {self.message}"


class RankMonitor:
    """One rank's view of the others' fate.

    Args:
        store: the job's store; a connection of its own is made from it. rank, world_size: of this process.
        name: separates the keys of several monitors over one store; the same on all ranks.
        host: under which others reach this machine; of rank 0.
        before_exit: called before a process that waits for a dead one is ended.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        name: str = "0",
        host: str = "127.0.0.1",
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = dist.PrefixStore(f"kenotron/{name}", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self._world_size = world_size
        self._before_exit = before_exit
        #: Asked once in a while, with the store: which rank waits for something else than this one, and what to say of it.
        self.who_parted: Callable[[dist.Store], tuple[int, str] | None] = lambda store: None
        self._lock = threading.Condition()
        self._gate_closed = False
        self._passed = 0
        self._stop_at: int | None = None
        self._requested = False
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._is_ending = False
        self._finished = threading.Event()
        self._peers = Peers(self._store, rank, host)
        self._main = threading.get_ident()
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

    def report_failure(self, error: BaseException) -> Failure | None:
        """Tell the other ranks why this one goes away. Returns the failure of another rank that was told before."""
        text = f"{self._rank}\n{type(error).__name__}\n{error}"
        try:
            first = _parsed(self._store.compare_set("failure", "", text))
        except RuntimeError:  # the store went away with its rank: that one has told already
            return self._failure
        return None if first.rank == self._rank else first

    def has_failed(self) -> bool:
        """Return whether another rank is known to have failed."""
        return self._failure is not None

    def failure_elsewhere(self, patience_s: float = 3.0) -> Failure | None:
        """Return what another rank failed with, waiting a little for it to say so."""
        deadline = time.monotonic() + patience_s
        while self._failure is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        return self._failure

    @property
    def failure(self) -> Failure | None:
        """What another rank failed with, as far as this one knows by now."""
        return self._failure

    def ended(self) -> set[int]:
        """Return the ranks that take part in nothing any more, as far as this one knows; from any thread."""
        failure = self._failure
        return {*self._peers.ended(), *([failure.rank] if failure is not None and failure.is_death else ())}

    def raise_failure(self) -> None:
        """Raise ``RuntimeError`` where another rank has failed."""
        if self._failure is not None:
            raise RuntimeError(str(self._failure))

    def begin_end(self) -> None:
        """This rank handles an error: from here on it ends by itself, however long what it saves takes."""
        self._is_ending = True

    def linger(self) -> None:
        """Give the other ranks the time to look once more."""
        time.sleep(2.5 * _PERIOD_S)

    def close(self) -> None:
        """Stop watching."""
        self._peers.leave()
        self._finished.set()
        self._peers.wake()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------------ thread

    def _watch(self) -> None:
        has_store = True
        while not self._finished.is_set():
            try:
                self._peers.wait(_PERIOD_S)
                if has_store:
                    self._look()
            except (RuntimeError, OSError):  # the store's server is gone, and rank 0 with it, or nearly
                has_store = False
                self._finished.wait(_PERIOD_S / 10)
            self._look_for_the_dead(has_store)
            self._end_if_stuck()
        with self._lock:
            self._gate_closed = False
            self._lock.notify_all()

    def _look(self) -> None:
        if self._failure is None and self._store.check(["failure"]):
            self._note(_parsed(self._store.get("failure")))
        if self._failure is None and (parted := self.who_parted(self._store)) is not None:
            self._note(Failure(parted[0], _PARTED, parted[1]))
        if self._requested:
            self._store.set("stop", "1")
        if self._stop_at is None and self._store.check(["stop"]):
            self._agree()

    def _note(self, failure: Failure) -> None:
        if failure.rank != self._rank and self._failure is None:
            self._failure, self._failed_at = failure, time.monotonic()

    def _look_for_the_dead(self, has_store: bool) -> None:
        """Note who has ended without a word, and tell the others."""
        dead = [rank for rank, had_left in self._peers.ended().items() if not had_left]
        if self._failure is not None or not dead:
            return
        message = "is gone: its process has ended without an error of its own. Was it killed, for want of memory perhaps?"
        failure = Failure(dead[0], _DIED, message)
        if has_store and self._rank == 0:
            text = f"{failure.rank}\n{failure.kind}\n{failure.message}"
            failure = _parsed(self._store.compare_set("failure", "", text))
        self._note(failure)

    def _end_if_stuck(self) -> None:
        failure = self._failure
        if failure is None or self._is_ending or time.monotonic() - self._failed_at < failure.patience_s:
            return
        self._before_exit()
        if self._is_ending or self._finished.is_set():
            return
        frame = sys._current_frames().get(self._main)
        where = "" if frame is None else f" (in {frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name})"
        try:
            print(f"rank {self._rank} ends, still waiting{where}: {failure}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads what is printed any more
            os._exit(1)

    def _agree(self) -> None:
        with self._lock:
            self._gate_closed = True
            passed = self._passed
        self._store.set(f"passed/{self._rank}", str(passed))
        keys = [f"passed/{rank}" for rank in range(self._world_size)]
        while not self._store.check(keys):
            if self._finished.wait(0.02):
                return
            if self._store.check(["failure"]) or self._peers.ended():  # who failed answers no more: let go, for everybody
                with self._lock:
                    self._gate_closed = False
                    self._lock.notify_all()
                return
        stop_at = max(int(self._store.get(key)) for key in keys)
        with self._lock:
            self._stop_at, self._gate_closed = stop_at, False
            self._lock.notify_all()


def _parsed(text: bytes) -> Failure:
    rank, kind, message = text.decode().split("\n", 2)
    return Failure(int(rank), kind, message)
