"""What callbacks that log numbers share: loggers, written to from one rank, and one table at the end of ``fit``."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning as L
from rich.console import Console
from rich.table import Table

_KEPT = 10_000  # values of each name, of which the median is taken


class Recorder(L.Callback):
    """A callback whose numbers go to all loggers, and into a table that rank 0 prints once when ``fit`` ends.

    The last recorder of a trainer prints the rows of all: nothing else has to be installed.
    """

    #: last part of a name -> which of its values is the best. Others have none.
    better: ClassVar[Mapping[str, Literal["max", "min"]]] = {}

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}

    def record(self, trainer: Any, values: Mapping[str, float]) -> None:
        """Log ``values`` at the current optimizer step, and keep them for the table. Called on any rank; rank 0 logs."""
        if not trainer.is_global_zero or not values:
            return
        for logger in trainer.loggers:  # not the module's log, which would turn counts into float32
            logger.log_metrics(dict(values), step=trainer.global_step)
        for name, value in values.items():
            if self.is_in_table(name):
                self._values.setdefault(name, deque(maxlen=_KEPT)).append(value)

    def is_in_table(self, name: str) -> bool:
        """Return whether a name has a row in the table."""
        return True

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return name, median, last and best value of each name."""
        rows = []
        for name, values in self._values.items():
            better = self.better.get(name.rpartition("/")[2])
            best = "" if better is None else _shown(max(values) if better == "max" else min(values))
            rows.append((name, _shown(statistics.median(values)), _shown(values[-1]), best))
        return rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new table."""
        self._values.clear()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table, if this is the last recorder."""
        recorders = [callback for callback in trainer.callbacks if isinstance(callback, Recorder)]  # type: ignore[attr-defined]
        if not trainer.is_global_zero or recorders[-1] is not self:
            return
        rows = [row for recorder in recorders for row in recorder.rows()]
        if not rows:
            return
        table = Table(title=f"{trainer.global_step} steps")
        for title in ("", "median", "last", "best"):
            table.add_column(title, justify="right" if title else "left", overflow="fold", no_wrap=bool(title))
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _shown(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def check_every(steps: int) -> int:
    """Return ``every_n_train_steps``, or raise ``ValueError``."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"every_n_train_steps={steps!r}: set it to 1 or more.")
    return steps


class EveryNSteps:
    """When a callback has its turn: after every n-th optimizer step, once, though several batches may make a step.

    Args:
        steps: ``every_n_train_steps``.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, steps: int) -> None:
        self._steps, self._last = check_every(steps), -1

    def begin(self, trainer: L.Trainer) -> None:
        """Remember where this ``fit`` begins: that step had its turn before."""
        self._last = trainer.global_step

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether it is the turn, after a batch; from then on no more at this step."""
        step = trainer.global_step
        if step % self._steps or step == self._last:
            return False
        self._last = step
        return True

    def is_next(self, trainer: L.Trainer) -> bool:
        """Return whether it is the turn after the coming optimizer step."""
        return (trainer.global_step + 1) % self._steps == 0
