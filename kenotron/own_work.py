"""How long this rank's own work takes. Waiting for other ranks is none, although a step's time holds it on every rank.

In a job whose ranks wait for each other in every step all steps take equally long, those of the slow rank and of all that
wait for it. So what is measured is:

- on a CPU: the processor time of the main thread, which runs forward, backward and update. A thread that waits in a
  collective uses none.
- everywhere: the time for which the main thread stands still outside of torch and of ``kenotron.parallel``: asleep, waiting for
  a disk, a lock, a data loader's worker. A thread looks every few milliseconds where it is; collectives are waited for inside.
- on CUDA: the processor time between two batches, in which they are loaded and made ready (in a step the host spins while it
  waits for the device, so that its time tells nothing), and `DeviceTime`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from kenotron import parallel

#: Costs some 20 µs each time.
_PERIOD_S = 0.01
_TORCH = str(Path(torch.__file__).parent)
_LOADERS = f"{_TORCH}/utils/data"
_PARALLEL = tuple(parallel.__path__)
_THREADING = threading.__file__
_RANKS = str(Path(__file__).with_name("ranks.py"))


class OwnWork:
    """Adds up the main thread's own work. Made, asked and closed on the main thread.

    Args:
        counts_steps: whether processor time in steps is work, as on a CPU; otherwise only that between batches.
    """

    def __init__(self, *, counts_steps: bool) -> None:
        self._counts_steps = counts_steps
        self._thread_id = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread_id)
        self._busy_s, self._blocked_s = 0.0, 0.0
        self._since = time.clock_gettime(self._clock)
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kenotron-own-work", daemon=True)
        self._thread.start()

    def begin_step(self) -> None:
        """A batch is there."""
        now = time.clock_gettime(self._clock)
        self._busy_s += now - self._since
        self._since = now

    def end_step(self) -> None:
        """The batch is done."""
        now = time.clock_gettime(self._clock)
        if self._counts_steps:
            self._busy_s += now - self._since
        self._since = now

    def take(self) -> float:
        """Return the seconds of work since the last call."""
        taken, self._busy_s = self._busy_s + self._blocked_s, 0.0
        self._blocked_s = 0.0  # a few milliseconds may be lost to the other thread at this moment
        return taken

    def close(self) -> None:
        """End the thread."""
        self._finished.set()
        self._thread.join()

    def _watch(self) -> None:
        wall, busy, was_own = time.perf_counter(), time.clock_gettime(self._clock), False
        while not self._finished.wait(_PERIOD_S):
            now, used = time.perf_counter(), time.clock_gettime(self._clock)
            is_own = not waits_for_ranks(sys._current_frames().get(self._thread_id))
            still = (now - wall) - (used - busy)
            # Both looks must have found it outside: between them it may have come out of a collective.
            if is_own and was_own and still > 0.5 * (now - wall):
                self._blocked_s += still
            wall, busy, was_own = now, used, is_own


def waits_for_ranks(frame: FrameType | None) -> bool:
    """Tell whether a thread that stands still here waits for other ranks, and not for something of its own."""
    while frame is not None and frame.f_code.co_filename == _THREADING:
        frame = frame.f_back
    if frame is None:
        return False
    file = frame.f_code.co_filename
    return file == _RANKS or file.startswith(_PARALLEL) or (file.startswith(_TORCH) and not file.startswith(_LOADERS))


class DeviceTime:
    """Measures on CUDA how long the forward passes of a module's leaves take in one step; collectives lie between them.

    Args:
        module: whose leaves are measured. device: where they run.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._hooks: list[Any] = []
        for leaf in _leaves(module):
            # Last before, and first after: what tensor parallelism or FSDP2 do in hooks of their own stays outside.
            self._hooks.append(leaf.register_forward_pre_hook(lambda *_: self._begin()))
            self._hooks.append(leaf.register_forward_hook(lambda *_: self._end(), prepend=True))

    def _begin(self) -> None:
        self._pairs.append((self._now(), self._now()))

    def _end(self) -> None:
        if self._pairs:
            self._pairs[-1] = (self._pairs[-1][0], self._now())

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> None:
        """Measure no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def seconds(self) -> float | None:
        """Return what was measured; ``None`` as long as the device has not got there."""
        if not all(end.query() for _, end in self._pairs):
            return None
        return sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1e3


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    for each in module.modules():
        if next(each.children(), None) is None and next(each.parameters(recurse=False), None) is not None:
            yield each
