"""A thread that runs jobs in the order of the calls, and ends when there is none left: nobody has to end it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator


class Worker:
    """Runs jobs one after the other, behind the calls. Jobs must not raise."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None  # the last one
        self._is_running = False
        self._num_announced = 0

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Have the thread at hand for a job that comes inside: where the system allows no more threads, this raises."""
        with self._state:
            self._start()
            self._num_announced += 1
        try:
            yield
        finally:
            with self._state:
                self._num_announced -= 1
                self._state.notify()

    def run(self, job: Callable[[], None]) -> None:
        """Run a job after those of earlier calls, and return at once."""
        with self._state:
            self._start()
            self._jobs.append(job)
            self._state.notify()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when all jobs are done, and the thread has ended."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _start(self) -> None:
        if not self._is_running:
            thread = threading.Thread(target=self._work, name="kenotron-checkpoint", daemon=True)
            thread.start()
            self._thread, self._is_running = thread, True

    def _work(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._jobs or not self._num_announced)
                if not self._jobs:
                    self._is_running = False  # under the lock: whoever comes next starts another
                    return
                job = self._jobs.popleft()
            job()
            del job  # and all that it holds, before waiting for the next
