"""Hugging Face directories while training goes on."""

from __future__ import annotations

import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from kenotron.callbacks.summary import check_every
from kenotron.hf import export
from kenotron.strategies.persistence import Persistence


class HFExport(L.Callback):
    """Write the model as a Hugging Face directory every so many optimizer steps, from any layout.

    ``dirpath/step=N`` appears when it is complete. All ranks save a checkpoint of the weights, which is removed again; rank 0
    makes the directory of it in a thread, meanwhile the training goes on. At the end of ``fit`` the last one is waited for.

    Args:
        dirpath: where the directories go; on a file system that all ranks see.
        every_n_train_steps: optimizer steps between two of them. The last step of a ``fit`` is always exported.
        settings: further arguments of :func:`kenotron.hf.export` (``dtype``, ``tokenizer``, …).

    Raises:
        ValueError: ``every_n_train_steps`` is not positive, or the strategy is not ``KenotronStrategy``.
        RuntimeError: an export failed; raised at the next one or at the end of ``fit``.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int, **settings: Any) -> None:
        check_every(every_n_train_steps)
        self._dirpath, self._every, self._settings = Path(dirpath), every_n_train_steps, settings
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies whose checkpoints can't be exported."""
        if stage == "fit" and not isinstance(trainer.strategy, Persistence):
            raise ValueError(
                f"HFExport exports checkpoints of KenotronStrategy, and the strategy is {type(trainer.strategy).__name__}. Set "
                "strategy='kenotron', or save with transformers' save_pretrained."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where this ``fit`` begins, which was dealt with before."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Export after every n-th optimizer step."""
        step = trainer.global_step
        if step % self._every == 0 and step != self._last_step:
            self._export(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the last step, and wait."""
        if trainer.global_step != self._last_step:
            self._export(trainer)
        self._wait()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait, where an exception ended the training."""
        if self._thread is not None:
            self._thread.join()

    def _export(self, trainer: L.Trainer) -> None:
        self._wait()
        self._last_step = trainer.global_step
        out = self._dirpath / f"step={trainer.global_step}"
        weights = self._dirpath / f".{out.name}.weights"
        trainer.save_checkpoint(weights, weights_only=True)
        assert isinstance(trainer.strategy, Persistence)
        trainer.strategy.checkpointer.wait()
        if trainer.is_global_zero:
            self._thread = threading.Thread(target=self._run, args=(weights, out), name="hf-export")
            self._thread.start()

    def _run(self, weights: Path, out: Path) -> None:
        try:
            if out.exists():
                warnings.warn(f"{out} is there already and is left as it is; give HFExport another dirpath.", stacklevel=1)
            else:
                export(weights, out, **self._settings)
        except BaseException as error:
            self._error = error
        finally:
            shutil.rmtree(weights, ignore_errors=True)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise RuntimeError(f"exporting to {self._dirpath} failed: {error}") from error
