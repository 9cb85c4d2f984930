"""How much memory a training takes, and what for."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kenotron.callbacks.summary import EveryNSteps, Recorder

_GIB = 2**30


class Memory(Recorder):
    """Log the memory of the fullest rank, in GiB, under ``memory/``.

    - ``device_peak_gib`` and ``device_reserved_gib`` (CUDA): the most that tensors took since the last log, and what torch's
      allocator holds. ``host_peak_gib``: the most that the process ever had resident; ``host_gib``: what it has now.
    - ``parameters_gib``, ``gradients_gib``, ``optimizer_gib``: what a rank keeps of these between steps (its shards), gradients
      as they are right before an update.

    Each is the maximum over ranks, found in one collective at each log; sizes are read from shapes alone.

    Args:
        every_n_train_steps: optimizer steps between two of them.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive.
    """

    better: ClassVar[Mapping[str, Literal["max", "min"]]] = {}

    def __init__(self, every_n_train_steps: int = 50) -> None:
        super().__init__()
        self._turn = EveryNSteps(every_n_train_steps)
        self._gradients: dict[int, int] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._turn.begin(trainer)
        self._gradients = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Gradients are all there."""
        if self._turn.is_next(trainer):
            params = (param for group in optimizer.param_groups for param in group["params"])
            self._gradients[id(optimizer)] = num_bytes(param.grad for param in params)

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        """Log after every n-th optimizer step."""
        if not self._turn.is_due(trainer):
            return
        device = trainer.strategy.root_device
        figures = {**_host(), **_device(device), **self._split(trainer, pl_module)}
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
        if trainer.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        if trainer.is_global_zero:
            found = zip(figures, values.tolist(), strict=True)
            self.record(trainer, {f"memory/{name}_gib": value / _GIB for name, value in found})

    def _split(self, trainer: Any, pl_module: L.LightningModule) -> dict[str, int]:
        states = (
            value
            for optimizer in trainer.optimizers
            for state in getattr(optimizer, "state", {}).values()
            if isinstance(state, dict)
            for value in state.values()
        )
        return {
            "parameters": num_bytes(pl_module.parameters()),
            "gradients": sum(self._gradients.values()),
            "optimizer": num_bytes(value for value in states if isinstance(value, Tensor)),
        }


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return how many bytes tensors take on this rank; of DTensors its part."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None)
    return sum(t.numel() * t.element_size() for t in local)


def host_bytes() -> int:
    """Return what the process has resident, or the most that it had where that is not told."""
    found = _host()
    return found.get("host", found["host_peak"])


def _host() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"host_peak": peak if sys.platform == "darwin" else peak * 1024}
    statm = Path("/proc/self/statm")
    if statm.exists():
        figures["host"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return figures


def _device(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    figures = {
        "device_peak": torch.cuda.max_memory_allocated(device), "device_reserved": torch.cuda.memory_reserved(device),
    }  # fmt: skip
    torch.cuda.reset_peak_memory_stats(device)
    return figures
