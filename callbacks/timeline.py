"""When the parts of a step were, on the device's own clock and without waiting for it."""

from __future__ import annotations

import time
from collections import deque

import torch

_PARTS = ("forward_backward", "optimizer")


class Timeline:
    """Measures parts of batches: with CUDA events that are read when they have long passed, elsewhere with the host's clock.

    Args:
        device: whose work is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._free: list[torch.cuda.Event] = []
        self._began: torch.cuda.Event | float | None = None
        self._part = ""
        self._spans: deque[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = deque()

    def begin(self, part: str) -> None:
        """End the part that runs, if any, and begin another; ``""``: none."""
        now = self._mark()
        if self._part and self._began is not None:
            self._spans.append((self._part, self._began, now))
        self._part, self._began = part, now

    def take(self, *, wait: bool = False) -> dict[str, float]:
        """Return the seconds of each part since the last call, of what the device has passed (or of all, with ``wait``)."""
        found = dict.fromkeys(_PARTS, 0.0)
        while self._spans:
            part, began, ended = self._spans[0]
            if isinstance(began, float) or isinstance(ended, float):
                assert isinstance(began, float) and isinstance(ended, float)
                found[part] += ended - began
            else:
                if not wait and not ended.query():
                    break
                ended.synchronize()
                found[part] += began.elapsed_time(ended) / 1000
                self._free.append(began)
            self._spans.popleft()
        return found

    def _mark(self) -> torch.cuda.Event | float:
        if not self._is_cuda:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
