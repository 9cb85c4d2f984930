"""A progress bar that counts optimizer steps."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepBar(TQDMProgressBar):
    """Lightning's progress bar over the steps of the whole run, where ``max_steps`` is known: with the time that is left.

    A run that is resumed begins where it was, and its rate is that of the steps since then. Without ``max_steps`` the bar is
    Lightning's, over batches. ``kenotron fit`` has it by itself in a terminal.

    Args:
        refresh_rate: batches between two updates.
    """

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Begin at the step where training does."""
        super().on_train_start(trainer)
        if trainer.max_steps > 0:
            bar = self.train_progress_bar
            bar.total, bar.initial, bar.n = trainer.max_steps, trainer.global_step, trainer.global_step
            bar.set_description("Step")

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        """Go on: epochs are no bars of their own."""
        if trainer.max_steps <= 0:
            super().on_train_epoch_start(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the step."""
        if trainer.max_steps <= 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        step, bar = trainer.global_step, self.train_progress_bar
        if step != bar.n and self._should_update(step, trainer.max_steps):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Any, pl_module: L.LightningModule) -> dict[str, Any]:
        """Leave out the version of the logger, which tells nothing of the training."""
        found: dict[str, Any] = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        return found
