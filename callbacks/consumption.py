"""What a training has taken of each corpus."""

from __future__ import annotations

from typing import Any

import lightning as L

from kenotron.callbacks.summary import EveryNSteps
from kenotron.data.loader import TrainLoader


class Consumption(L.Callback):
    """Log how much of each corpus has been trained: ``data/<corpus>/samples``, ``tokens`` and ``epochs``.

    They are computed from the run's position in :class:`kenotron.TokenData`, and cost nothing on the device.

    Args:
        every_n_train_steps: optimizer steps between two of them.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive, or the data is another one.
    """

    def __init__(self, every_n_train_steps: int = 50) -> None:
        self._turn = EveryNSteps(every_n_train_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where this ``fit`` begins."""
        self._turn.begin(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log after every n-th optimizer step."""
        if not self._turn.is_due(trainer):
            return
        loader = trainer.train_dataloader
        if not isinstance(loader, TrainLoader):
            raise ValueError(
                f"Consumption counts what kenotron.TokenData trained, and the training data is a {type(loader).__name__}. "
                "Leave the callback out."
            )
        values: dict[str, float] = {}
        for name, taken in loader.consumed().items():
            values |= {f"data/{name}/samples": taken.samples, f"data/{name}/tokens": taken.tokens}
            values[f"data/{name}/epochs"] = taken.epochs
        for logger in trainer.loggers:  # not the module's log, which would turn counts into float32
            logger.log_metrics(values, step=trainer.global_step)
