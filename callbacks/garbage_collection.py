"""Python's garbage collector, on all ranks at the same steps."""

from __future__ import annotations

import gc
import time
from typing import Any

import lightning as L

from kenotron.callbacks.summary import EveryNSteps, Recorder


class GarbageCollection(Recorder):
    """Switch Python's own garbage collection off during training, and collect every n-th optimizer step instead.

    By itself it comes at other times on each rank, and in each collective all wait for the one that collects. Here they all do
    so at the same step. After ``fit``, or an exception in it, everything is as it was. Logs ``garbage/collect_seconds`` and
    ``garbage/collected_objects``.

    Args:
        every_n_train_steps: optimizer steps between two collections.
        generation: 0, 1 or 2: how old the objects may be that are looked at. 2: all of them.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, every_n_train_steps: int = 100, *, generation: int = 1) -> None:
        super().__init__()
        if generation not in (0, 1, 2):
            raise ValueError(f"generation={generation!r}: set it to 0, 1 or 2, which looks at all objects.")
        self._turn, self._generation = EveryNSteps(every_n_train_steps), generation
        self._was_enabled: bool | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect what building the model has left, and take over."""
        self._turn.begin(trainer)
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Collect after every n-th optimizer step."""
        if not self._turn.is_due(trainer):
            return
        began = time.perf_counter()
        collected = gc.collect(self._generation)
        seconds = time.perf_counter() - began
        self.record(trainer, {"garbage/collect_seconds": seconds, "garbage/collected_objects": collected})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Hand back."""
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hand back."""
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()
        self._was_enabled = None
