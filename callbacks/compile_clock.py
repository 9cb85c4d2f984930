"""How long ``torch.compile`` has compiled in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

from kenotron.parallel._torch import watch_compilation


class CompileClock:
    """Counts the seconds that the host spends compiling, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None
        self._end: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin to count."""
        self._end = watch_compilation(self._on_begin, self._on_end)

    def stop(self) -> None:
        """Count no more. Does nothing a second time."""
        if self._end is not None:
            self._end()
            self._end = None

    def _on_begin(self) -> None:
        self._began = time.perf_counter()

    def _on_end(self) -> None:
        if self._began is not None:  # else it had begun before we looked
            self.seconds += time.perf_counter() - self._began
            self._began = None
