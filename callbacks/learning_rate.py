"""The learning rates that updates really used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kenotron.callbacks.summary import Recorder, check_every


class LearningRate(Recorder):
    """Log the learning rate of each parameter group: ``learning_rate/<optimizer>/<group>``.

    It is read from the optimizer right after an update, so it is the one that was used, whatever schedules it: a scheduler of
    torch, :class:`kenotron.optim.ScheduleLR`, a callback, the optimizer itself. Updates that do not take place (fp16 with an
    overflow) are not logged. Groups are called by their ``"name"``, or numbered.

    Args:
        every_n_train_steps: optimizer steps between two of them.
        momentum: log ``momentum/<optimizer>/<group>`` too: the momentum, or the first of Adam's betas.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive.
    """

    def __init__(self, every_n_train_steps: int = 1, *, momentum: bool = False) -> None:
        super().__init__()
        self._every, self._momentum = check_every(every_n_train_steps), momentum
        self._handles: list[RemovableHandle] = []
        self._used: dict[str, float | Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the optimizers."""
        self._used = {}
        optimizers: list[Any] = list(trainer.optimizers)
        names = [type(optimizer).__name__ for optimizer in optimizers]
        for index, optimizer in enumerate(optimizers):
            name = names[index] if names.count(names[index]) == 1 else f"{names[index]}_{index}"
            if isinstance(optimizer, Optimizer):
                self._handles.append(optimizer.register_step_post_hook(self._reader(name)))

    def _reader(self, name: str) -> Callable[[Optimizer, Any, Any], None]:
        def read(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for number, group in enumerate(optimizer.param_groups):
                where = f"{name}/{group.get('name', f'group_{number}')}"
                self._used[f"learning_rate/{where}"] = _copy(group["lr"])
                momentum = group["momentum"] if "momentum" in group else group.get("betas", (None,))[0]
                if self._momentum and momentum is not None:
                    self._used[f"momentum/{where}"] = _copy(momentum)

        return read

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log what the update used, if there was one."""
        used, self._used = self._used, {}
        if not used or trainer.global_step % self._every:
            return
        tensors = {name: value for name, value in used.items() if isinstance(value, Tensor)}
        if tensors:  # rates of capturable optimizers live on the device: one copy for all
            found = torch.stack([value.double() for value in tensors.values()]).tolist()
            used |= dict(zip(tensors, found, strict=True))
        self.record(trainer, {name: float(value) for name, value in used.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the optimizers."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers."""
        self._leave()

    def _leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _copy(value: Any) -> float | Tensor:
    """A rate in a tensor may change before it is logged."""
    return value.detach().clone() if isinstance(value, Tensor) else float(value)
