"""How fast a training is, of what its steps consist, and how much of the hardware it uses."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from kenotron import devices
from kenotron.callbacks.batches import amount_in
from kenotron.callbacks.compile_clock import CompileClock
from kenotron.callbacks.summary import Recorder, check_every
from kenotron.callbacks.timeline import Timeline
from kenotron.checkpoint import Checkpointer
from kenotron.flops import FlopCounter, Flops, of_block, total
from kenotron.parallel.pipeline import Pipeline
from kenotron.strategies.training import Training


@dataclass(kw_only=True)
class _Window:
    """What happened between two logs.

    Args:
        began: on the host's clock. amount: tokens of this rank. work: their sum, each times the length of its sequence.
        away: seconds of validation. compiling: of compilation, within ``forward_backward``.
        seconds: of this rank's parts of steps.
    """

    began: float
    steps: int = 0
    amount: int = 0
    work: int = 0
    away: float = 0.0
    data: float = 0.0
    stall: float = 0.0
    compiling: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    sums: Tensor | None = None
    step: int = 0


class Throughput(Recorder):
    """Log tokens per second, what a step consists of, model FLOPs utilisation and goodput, under ``throughput/``.

    Works with any strategy. Nothing waits for the device: its times are those of CUDA events, read long after. Ranks exchange
    their counts once for each log, and once for the FLOPs of the first batch, which are counted while it runs
    (:mod:`kenotron.flops`). That batch is not in the figures, unless it is the only one.

    - ``step_seconds``: mean time of an optimizer step, and its parts: ``data_wait_seconds`` (from the end of a batch to the
      begin of the next, without validation), ``forward_backward_seconds``, ``optimizer_seconds`` (clipping and update),
      ``checkpoint_stall_seconds`` (what ``save_checkpoint`` took, and what updates waited for a copy of the weights).
    - ``compile_seconds``: what ``torch.compile`` has taken so far, where it has; it is in none of the other figures.
    - ``tokens_per_second``, the same ``_per_device``, and ``tokens``: the positions of the global batch, padding included.
      A batch without token ids counts ``samples`` instead.
    - ``model_tflops_per_second_per_device``, and ``mfu_full_percent`` and ``mfu_causal_percent``: with attention in which every
      query sees every key, and with half of it.
    - ``goodput_percent``: of the time since the first start, how much went into steps that are in the weights: what a crash
      lost and the time until a restart are not. It is saved in checkpoints.

    Args:
        every_n_train_steps: optimizer steps between two logs.
        tokens_of: a batch -> its number of tokens on this rank, where it can't be found: it is the size of the first tensor of
            integers that is called ``input_ids`` or ``tokens``, or has two dimensions.
        peak_flops: of one device, in FLOP/s; ``None``: as :mod:`kenotron.devices` knows it for the trainer's precision. On
            hardware that it does not know there is no utilisation.
        count_flops: count the FLOPs of the first batch.

    Raises:
        ValueError: a setting is out of range.
    """

    better: ClassVar[Mapping[str, Literal["max", "min"]]] = {
        "tokens_per_second": "max", "tokens_per_second_per_device": "max", "samples_per_second": "max",
        "samples_per_second_per_device": "max", "step_seconds": "min", "data_wait_seconds": "min",
        "forward_backward_seconds": "min", "optimizer_seconds": "min", "mfu_full_percent": "max", "mfu_causal_percent": "max",
        "model_tflops_per_second_per_device": "max",
    }  # fmt: skip

    def __init__(
        self,
        every_n_train_steps: int = 50,
        *,
        tokens_of: Callable[[Any], int] | None = None,
        peak_flops: float | None = None,
        count_flops: bool = True,
    ) -> None:
        super().__init__()
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops={peak_flops}: set the FLOP/s of one device (989e12 for an H100 in bf16), or None.")
        self._every, self._tokens_of, self._peak = check_every(every_n_train_steps), tokens_of, peak_flops
        self._counts_flops = count_flops
        self._first_start: float | None = None
        self._productive, self._total = 0.0, 0
        self.flops: Flops | None = None  #: of the batch that was counted, over all ranks
        self._restore: Callable[[], None] | None = None
        self._counter: FlopCounter | None = None
        self._replicas, self._unit, self._base, self._wants_count = 1, "tokens", (0.0, 0.0), count_flops
        self._window: _Window | None = None  # None: nothing is trained, as in a validation before
        self._first: _Window | None = None
        self._pending: _Window | None = None
        self._left = (0.0, 0.0)

    # ------------------------------------------------------------------------------------------------ begin and end

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to measure."""
        strategy: Any = trainer.strategy
        if self._first_start is None:
            self._first_start = time.time()
        self._timeline = Timeline(strategy.root_device)
        sampling = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1}
        self._replicas = int(sampling["num_replicas"])
        self._unit, self.flops, self._base = "tokens", None, (0.0, 0.0)
        self._wants_count = self._counts_flops
        self._first = self._pending = None
        self._has_logged = False
        self._last_step, self._fence = trainer.global_step, (0, 0.0)
        self._stall = self._stall_seen = self._compiling_seen = 0.0
        self._compiler = CompileClock()
        self._compiler.start()
        self._hook(trainer)
        self._ended = time.perf_counter()
        self._window = _Window(began=self._ended)

    def _hook(self, trainer: Any) -> None:
        """Learn when optimizers are done, and how long saving takes."""
        handles = [
            optimizer.register_step_post_hook(self._after_update)
            for optimizer in trainer.optimizers
            if isinstance(optimizer, Optimizer)
        ]
        save, is_own = trainer.save_checkpoint, "save_checkpoint" in trainer.__dict__

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return save(*args, **kwargs)
            finally:
                self._stall += time.perf_counter() - began

        def restore() -> None:
            for handle in handles:
                handle.remove()
            if is_own:
                trainer.save_checkpoint = save
            else:
                trainer.__dict__.pop("save_checkpoint", None)

        trainer.save_checkpoint, self._restore = timed, restore

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left."""
        if self._running.steps:
            self._close(trainer)
        elif self._first is not None and not self._has_logged:
            self._window = self._first
            self._close(trainer)
        self._flush(trainer)
        self._leave()
        self._window = None

    @property
    def _running(self) -> _Window:
        assert self._window is not None
        return self._window

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put back what was hooked."""
        self._leave()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put back what was hooked."""
        self._leave()

    def _leave(self) -> None:
        if self._counter is not None:
            self._counter.stop()
            self._counter = None
        if self._restore is not None:
            self._restore()
            self._restore = None
            self._compiler.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what goodput and the count of tokens go on from."""
        open_ones = [each for each in (self._window, self._pending) if each is not None and each is not self._first]
        since = sum(each.amount for each in open_ones) * self._replicas
        return {"first_start": self._first_start, "productive_seconds": self._productive, "total": self._total + since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._first_start = state_dict["first_start"]
        self._productive, self._total = state_dict["productive_seconds"], state_dict["total"]

    # ------------------------------------------------------------------------------------------------------ a batch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the wait for data, and count the batch."""
        now, window = time.perf_counter(), self._running
        stall, self._stall_seen = self._stall - self._stall_seen, self._stall
        window.stall += stall
        window.data += max(0.0, now - self._ended - window.away - stall)
        window.wall -= window.away
        window.away = 0.0
        amount, length, self._unit = amount_in(batch, self._tokens_of)
        window.amount += amount
        window.work += amount * (length or 1)
        if self._wants_count:
            self._start_count(trainer, length)
        self._began = now
        self._timeline.begin("forward_backward")

    def _start_count(self, trainer: Any, length: int | None) -> None:
        self._wants_count = False
        is_split = isinstance(trainer.strategy, Training) and trainer.world_size > self._replicas
        lengths = () if length is None else (length, length - 1)
        self._counter = FlopCounter(lengths, compare=is_split, skip=(Pipeline._probe,)).start()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Gradients are there: the update begins."""
        self._timeline.begin("optimizer")
        if self._counter is not None:
            self._counter.is_paused = True

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._timeline.begin("forward_backward")
        if self._counter is not None:
            self._counter.is_paused = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log, if it is time to."""
        self._timeline.begin("")
        now, window = time.perf_counter(), self._running
        waited = self._waited_for_fence(trainer)
        stall, self._stall_seen = self._stall - self._stall_seen + waited, self._stall
        window.stall += stall
        window.seconds["optimizer"] = window.seconds.get("optimizer", 0.0) - waited
        compiling, self._compiling_seen = self._compiler.seconds - self._compiling_seen, self._compiler.seconds
        window.compiling += compiling
        self._productive += now - self._began - stall - compiling
        self._ended = now
        window.steps += trainer.global_step - self._last_step
        is_update, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if self._counter is not None:
            self._finish_count(trainer, pl_module)
            window.wall = time.perf_counter() - window.began
            window.seconds |= self._timeline.take()
            self._first, self._ended = window, time.perf_counter()
            self._window = _Window(began=self._ended)
        elif is_update and trainer.global_step % self._every == 0:
            self._close(trainer)
            self._ended = time.perf_counter()

    def _waited_for_fence(self, trainer: Any) -> float:
        """Return how long the update of this batch waited for a checkpoint's copy of the weights."""
        strategy = trainer.strategy
        owner = strategy if isinstance(strategy, Training) else strategy.checkpoint_io
        checkpointer = getattr(owner, "checkpointer", None)
        last = checkpointer.last if isinstance(checkpointer, Checkpointer) else None
        if last is None:
            return 0.0
        seconds, before = last.stats.get("fence_s", 0.0), self._fence
        self._fence = (id(last), seconds)
        return seconds - (before[1] if before[0] == id(last) else 0.0)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is no wait for data."""
        if self._window is not None:
            self._left = (time.perf_counter(), self._stall)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back in training."""
        if self._window is not None:
            began, stall = self._left
            self._window.away += time.perf_counter() - began - (self._stall - stall)

    # -------------------------------------------------------------------------------------------------------- FLOPs

    def _finish_count(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Sum the FLOPs of the batch over all ranks."""
        counter, self._counter = self._counter, None
        assert counter is not None
        counter.stop()
        products, share = counter.products(), 1.0
        if isinstance(trainer.strategy, Training) and trainer.world_size > self._replicas:
            mesh = pl_module.device_mesh
            assert mesh is not None
            products = of_block(products, [mesh[axis].get_group() for axis in ("tp", "cp", "pp")])
            share = self._replicas / trainer.world_size  # all ranks of a block have the block's
        if counter.unknown:
            rank_zero_warn(f"Throughput can't count the FLOPs of {', '.join(sorted(counter.unknown))}: utilisation is too low.")
        found, window = total(products), self._running
        mine = [found.attention * share, found.other * share, *self._global(trainer, window)]
        sums = torch.tensor(mine, dtype=torch.float64, device=_device(trainer))
        if trainer.world_size > 1:
            dist.all_reduce(sums)
        attention, other, amount, work = sums.tolist()
        self.flops, self._base = Flops(attention=attention, other=other), (amount, work)
        self._total += round(amount)

    def _global(self, trainer: Any, window: _Window) -> tuple[float, float]:
        """Return this rank's share of the counts: ranks of a block have the same batches."""
        share = self._replicas / trainer.world_size
        return window.amount * share, window.work * share

    # ------------------------------------------------------------------------------------------------------ logging

    def _close(self, trainer: Any) -> None:
        """End a window, and log the one before (or this one, where numbers need no wait)."""
        self._flush(trainer)
        window, now = self._running, time.perf_counter()
        if window is not self._first:
            window.wall += now - window.began - window.away - window.compiling  # of validation after the last batch
            for part, seconds in self._timeline.take().items():
                window.seconds[part] = window.seconds.get(part, 0.0) + seconds
        window.step = trainer.global_step
        counts = torch.tensor(self._global(trainer, window), dtype=torch.float64, device=_device(trainer))
        if trainer.world_size > 1:
            dist.all_reduce(counts)
        window.sums = counts
        self._pending, self._window = window, _Window(began=now)
        if counts.device.type == "cpu":
            self._flush(trainer)

    def _flush(self, trainer: Any) -> None:
        """Log the window that is closed. On CUDA its sums have been there for long."""
        window, self._pending = self._pending, None
        if window is None:
            return
        assert window.sums is not None
        amount, work = window.sums.tolist()
        if window is not self._first:
            self._total += round(amount)
        self._has_logged = True
        self.record(trainer, self._figures(trainer, window, amount, work))

    def _figures(self, trainer: Any, window: _Window, amount: float, work: float) -> dict[str, float]:
        steps, wall, unit = max(1, window.steps), window.wall, self._unit
        devices_used = trainer.world_size
        figures = {
            f"{unit}_per_second": amount / wall,
            f"{unit}_per_second_per_device": amount / wall / devices_used,
            unit: self._total,
            "step_seconds": wall / steps,
            "data_wait_seconds": window.data / steps,
            "forward_backward_seconds": max(0.0, window.seconds.get("forward_backward", 0.0) - window.compiling) / steps,
            "optimizer_seconds": max(0.0, window.seconds.get("optimizer", 0.0)) / steps,
            "checkpoint_stall_seconds": window.stall / steps,
        }
        if self._compiler.seconds:
            figures["compile_seconds"] = self._compiler.seconds
        if self.flops is not None:
            figures |= self._utilisation(trainer, amount, work, wall * devices_used)
        assert self._first_start is not None
        figures["goodput_percent"] = 100 * self._productive / max(1e-9, time.time() - self._first_start)
        return {f"throughput/{name}": value for name, value in figures.items()}

    def _utilisation(self, trainer: Any, amount: float, work: float, device_seconds: float) -> dict[str, float]:
        assert self.flops is not None
        tokens, squares = self._base
        other, attention = self.flops.other * amount / tokens, self.flops.attention * work / squares
        figures = {"model_tflops_per_second_per_device": (other + attention) / device_seconds / 1e12}
        peak = self._peak or _peak(trainer)
        if peak is not None:
            figures["mfu_full_percent"] = 100 * (other + attention) / device_seconds / peak
            figures["mfu_causal_percent"] = 100 * (other + attention / 2) / device_seconds / peak
        return figures


def _device(trainer: Any) -> torch.device:
    device: torch.device = trainer.strategy.root_device
    return device


def _peak(trainer: Any) -> float | None:
    """Return the FLOP/s of a device in the trainer's precision, where they are known."""
    known = devices.identify(_device(trainer))
    if known is None:
        return None
    precision = str(trainer.precision)
    kind = "fp8" if "transformer-engine" in precision else "bf16" if "16" in precision else "fp32"
    found = known.peak_flops.get(kind)
    if found is None:
        warnings.warn(f"The peak of {known.name} in {kind} is not known: give Throughput peak_flops.", stacklevel=2)
    return found
