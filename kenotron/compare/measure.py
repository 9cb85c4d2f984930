"""What a run is measured by: losses, speed, memory, and what a checkpoint costs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from kenotron.compare.job import Job
from kenotron.strategies.base import StrategyBase


class Memory:
    """The most memory that this process takes from now on: of its GPU, or resident on the host beyond what it has now."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self._before = self._peak()

    def peak_bytes(self) -> int:
        """Return it, so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._peak() - self._before

    def _peak(self) -> int:
        status = Path("/proc/self/status")
        if status.exists():
            (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter(L.Callback):
    """Measures a training. After all steps but one it saves a checkpoint; the last step shows what that costs afterwards.

    Args:
        job: what is trained. checkpoint: where it is saved. memory: counts from before the module was built.
    """

    def __init__(self, job: Job, checkpoint: Path, memory: Memory) -> None:
        self._job, self._checkpoint, self._memory = job, checkpoint, memory
        self._losses: list[list[Tensor]] = []
        self._samples, self._tokens, self._step = 0, 0, 0
        self._marks: dict[str, float] = {}
        self._save_s = 0.0
        self._peak = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill what was built on the meta device with the weights that all strategies begin with."""
        if self._job.weights.exists() and isinstance(trainer.strategy, StrategyBase):
            state = torch.load(self._job.weights, mmap=True, weights_only=True)
            trainer.strategy.load_model_state_dict({"state_dict": state}, strict=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and the time where a section of the run ends."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if len(self._losses) == self._step:
            self._losses.append([])
        self._losses[-1].append(loss.detach())
        job = self._job
        if job.warmup <= self._step < job.steps - 1:
            samples, tokens = sizes(batch)
            self._samples, self._tokens = self._samples + samples, self._tokens + tokens
        if trainer.global_step == self._step:
            return  # gradients accumulate
        self._step = trainer.global_step
        if self._step == job.warmup:
            self._mark("warm", trainer)
        if self._step == job.steps - 1:
            self._mark("trained", trainer)
            self._peak = self._memory.peak_bytes()
            trainer.save_checkpoint(self._checkpoint)
            self._mark("saved", trainer)
        if self._step == job.steps:
            self._mark("end", trainer)

    def _mark(self, name: str, trainer: L.Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._marks[name] = time.perf_counter()

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return this rank's figures, as JSON takes them."""
        marks, job = self._marks, self._job
        if "end" not in marks:
            raise ValueError(
                f"the training ended after {self._step} of {job.steps} steps. Give more data, or fewer steps by --steps."
            )
        seconds = marks["trained"] - marks["warm"]
        step_s = seconds / (job.steps - 1 - job.warmup)
        saving, after = marks["saved"] - marks["trained"], marks["end"] - marks["saved"]
        kwargs = trainer.distributed_sampler_kwargs or {"num_replicas": 1}
        return {
            "losses": [float(torch.stack(step).float().mean()) for step in self._losses],
            "samples_per_second": self._samples * kwargs["num_replicas"] / seconds,
            "tokens_per_second": self._tokens * kwargs["num_replicas"] / seconds,
            "step_s": step_s,
            "peak_memory_bytes": self._peak,
            "checkpoint_stall_s": saving + max(after - step_s, 0.0),
        }


def sizes(batch: Any) -> tuple[int, int]:
    """Return how many samples and tokens a batch holds.

    Tokens are the elements of the first tensor of integers with two dimensions or more; where there is none, samples.
    """
    tensors = [tensor for tensor in _tensors(batch) if tensor.ndim]
    if not tensors:
        return 1, 1
    ids = [tensor for tensor in tensors if tensor.ndim > 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool]
    samples = tensors[0].shape[0]
    return samples, ids[0].numel() if ids else samples


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors(part)]


class LoadTimer:
    """Times what a strategy does to restore a checkpoint."""

    def __init__(self, strategy: Any) -> None:
        self.seconds = 0.0
        for name in ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict"):
            setattr(strategy, name, self._timed(getattr(strategy, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed
