"""A line for each log, for those who read a training in a file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kenotron.callbacks.batches import amount_in
from kenotron.callbacks.gradient_norms import gradient_source
from kenotron.callbacks.memory import host_bytes
from kenotron.callbacks.summary import EveryNSteps

_LOSSES = ("loss", "train_loss", "loss_step", "train_loss_step")


class StepLines(L.Callback):
    """Print a line every so many optimizer steps: loss, learning rate, gradient norm, tokens per second, memory, time left.

    The loss is that which the module logs as ``loss`` or ``train_loss``, or what its last step returned; the gradient norm is
    that before clipping, over all ranks, and takes a collective at these steps alone; tokens are those of all ranks, by the
    time since the last line without validation; memory is rank 0's peak on its GPU, or what the process has resident. Where
    the strategy hides gradients (Lightning's FSDP, DeepSpeed), or they are sparse, the norm is left out. ``kenotron fit`` has
    it by itself.

    Args:
        every_n_train_steps: optimizer steps between two of them; ``None``: the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        self._every = every_n_train_steps
        self._turn = EveryNSteps(1 if every_n_train_steps is None else every_n_train_steps)
        self._handles: list[RemovableHandle] = []
        self._rate: float | Tensor | None = None
        self._norm: float | None = None
        self._amount, self._unit, self._began, self._step = 0, "tokens", 0.0, 0
        self._left: float | None = None

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        if self._every is None:
            self._turn = EveryNSteps(max(1, trainer.log_every_n_steps))
        self._turn.begin(trainer)
        self._norm = self._rate = None
        self._amount, self._began, self._step = 0, time.perf_counter(), trainer.global_step
        self._leave()
        for optimizer in trainer.optimizers[:1]:
            if isinstance(optimizer, Optimizer):  # whatever schedules it: the rate that the update has used
                self._handles.append(optimizer.register_step_post_hook(self._after_update))

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rate = optimizer.param_groups[0]["lr"]
        self._rate = rate.detach().clone() if isinstance(rate, Tensor) else rate

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch, if there is anything in it to count."""
        try:
            amount, _, self._unit = amount_in(batch)
        except ValueError:
            return
        self._amount += amount

    def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Find the norm of the gradient where it will be printed."""
        if not self._turn.is_next(trainer) or optimizer is not trainer.optimizers[0]:
            return
        if not _shows_gradients(trainer.strategy, optimizer):
            return
        source = gradient_source(trainer, pl_module)
        names = {name for group in source.parameter_names(optimizer) for name in group}
        self._norm = float(source.grad_norms({"total": names})["total"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print, after every n-th optimizer step."""
        if self._turn.is_due(trainer):
            parts = self._parts(trainer, outputs)
            self._norm, self._amount = None, 0
            self._began, self._step = time.perf_counter(), trainer.global_step
            if trainer.is_global_zero:
                bar = trainer.progress_bar_callback
                (bar.print if isinstance(bar, RichProgressBar | TQDMProgressBar) and bar.is_enabled else _print)(
                    " | ".join(parts)
                )

    def _parts(self, trainer: Any, outputs: Any) -> list[str]:
        step, steps = trainer.global_step, trainer.max_steps
        seconds = max(time.perf_counter() - self._began, 1e-9)
        parts = [f"step {step:,}/{steps:,}" if steps > 0 else f"step {step:,}"]
        loss = _loss(trainer.callback_metrics, outputs)
        parts += [] if loss is None else [f"loss {loss:.4f}"]
        parts += [] if self._rate is None else [f"lr {float(self._rate):.3e}"]
        parts += [] if self._norm is None else [f"grad norm {self._norm:.3f}"]
        if self._amount:
            sampling = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1}
            parts.append(f"{self._amount * int(sampling['num_replicas']) / seconds:,.0f} {self._unit}/s")
        parts.append(f"{_memory(trainer.strategy.root_device) / 2**30:.2f} GiB")
        if steps > 0:
            left = (steps - step) * seconds / max(1, step - self._step)
            parts.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left")
        return parts

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is no part of a step."""
        self._left = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back in training."""
        if self._left is not None:
            self._began += time.perf_counter() - self._left
            self._left = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the optimizer."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._leave()

    def _leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _shows_gradients(strategy: Any, optimizer: Optimizer) -> bool:
    """Return whether norms can be taken: a line in a log is no reason to end a training."""
    if type(strategy).__name__ in ("FSDPStrategy", "DeepSpeedStrategy") or strategy.root_device.type == "mps":
        return False  # MPS has no float64
    return not any(p.grad is not None and p.grad.is_sparse for group in optimizer.param_groups for p in group["params"])


def _print(text: str) -> None:
    print(text, flush=True)


def _loss(logged: Mapping[str, Any], outputs: Any) -> float | None:
    found = next((logged[name] for name in _LOSSES if name in logged), None)
    if found is None:
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return float(found) if isinstance(found, Tensor) and found.numel() == 1 else None


def _memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_bytes()
