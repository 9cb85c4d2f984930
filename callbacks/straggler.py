"""Which ranks the others wait for."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from kenotron.callbacks.summary import check_every
from kenotron.devices import to_host
from kenotron.own_work import DeviceTime, OwnWork
from kenotron.strategies.training import Training

#: Differences below this are noise, whatever their share.
_LEAST_S = 0.001


class StragglerDetector(L.Callback):
    """Find ranks whose own work in a step takes longer than that of their peers, and name them and their hosts.

    Steps take equally long on all ranks, since these wait for the slowest. What is compared is each rank's own work
    (``kenotron.own_work``): processor time, time asleep or waiting for its disk or data, on CUDA the device's time in the
    module's leaves, sampled in one step of every ``every_n_train_steps``. Peers are the ranks of the same pipeline stage, where
    it has several.

    One all-gather of a float every so many steps. On CUDA the host reads the result when the next one is due, so that it
    waits for nothing. Logs ``straggler/slowest_seconds``, ``straggler/median_seconds`` (both per step) and
    ``straggler/skew_percent``. Any strategy with a process group.

    Args:
        every_n_train_steps: optimizer steps over which work is averaged before it is compared.
        factor: a rank is slow if its work takes so many times the median of its peers.
        device_time: sample the device's time by hooks on modules. ``False`` where blocks are compiled, which hooks would
            make happen again.

    Raises:
        ValueError: settings out of range; at set-up a job of several ranks without a process group.
    """

    def __init__(self, every_n_train_steps: int = 50, factor: float = 1.3, *, device_time: bool = True) -> None:
        check_every(every_n_train_steps)
        if factor <= 1:
            raise ValueError(f"factor={factor}: a slow rank takes more than 1 times the median. Set 1.3, for instance.")
        self._every, self._factor, self._device_time = every_n_train_steps, factor, device_time
        self._last_step = -1
        self._work: OwnWork | None = None
        self._sampled: DeviceTime | None = None
        self._begun: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._hosts: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse ranks that can't talk by ``torch.distributed``."""
        if stage == "fit" and trainer.world_size > 1 and not dist.is_initialized():
            raise ValueError(
                "StragglerDetector compares ranks by torch.distributed, which "
                f"{type(trainer.strategy).__name__} has not set up. Set strategy='kenotron' or 'ddp'."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn who is where, and begin to measure."""
        self._last_step, self._begun, self._sampled = trainer.global_step, None, None
        self._hosts = [socket.gethostname()] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(self._hosts, socket.gethostname())
        self._work = OwnWork(counts_steps=trainer.strategy.root_device.type != "cuda")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step, and sample the device in the first one after a comparison."""
        assert self._work is not None
        self._work.begin_step()
        device = trainer.strategy.root_device
        if device.type == "cuda" and self._device_time and self._sampled is None:
            self._sampled = DeviceTime(pl_module, device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Compare after every n-th optimizer step."""
        assert self._work is not None
        self._work.end_step()
        step = trainer.global_step
        if self._sampled is not None and step != self._last_step:
            self._sampled.stop()
        if step - self._last_step >= self._every:
            self._compare(trainer, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell what is left, and stop."""
        self._tell(trainer)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop."""
        self._close()

    def _close(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work = None
        if self._sampled is not None:
            self._sampled.stop()
            self._sampled = None

    def _compare(self, trainer: L.Trainer, step: int) -> None:
        assert self._work is not None
        self._tell(trainer)
        seconds = self._work.take() / (step - self._last_step)
        if self._sampled is not None:
            seconds += self._sampled.seconds() or 0.0
            self._sampled = None
        self._last_step = step
        device = trainer.strategy.root_device
        own = torch.tensor([seconds], dtype=torch.float32).to(device, non_blocking=True)
        everybody = own.clone()
        if trainer.world_size > 1:
            gathered = [torch.empty_like(own) for _ in range(trainer.world_size)]
            dist.all_gather(gathered, own)
            everybody = torch.cat(gathered)
        self._begun = step, *to_host(everybody)
        if device.type != "cuda":
            self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        """Log the comparison that was begun last."""
        begun, self._begun = self._begun, None
        if begun is None or not trainer.is_global_zero:
            return
        step, seconds, ready = begun
        if ready is not None:
            ready.synchronize()  # of long ago, except at the end of training
        by_rank: list[float] = seconds.tolist()
        slow = find_slow(by_rank, _peers(trainer), self._factor)
        slowest, middle = max(by_rank), median_low(by_rank)
        skew = 100 * (slowest / middle - 1) if middle > 0 else 0.0
        values = {"slowest_seconds": slowest, "median_seconds": middle, "skew_percent": skew}
        for logger in trainer.loggers:
            logger.log_metrics({f"straggler/{name}": value for name, value in values.items()}, step=step)
        if slow:
            names = [
                f"rank {rank} on {self._hosts[rank]} takes {1e3 * by_rank[rank]:.1f} ms for its own work, "
                f"{times:.2f} times the median"
                for rank, times in slow
            ]
            rank_zero_warn("\n".join([f"Steps up to {step}: the other ranks wait for {len(slow)}.", *names]))


def find_slow(seconds: Sequence[float], peers: Sequence[Sequence[int]], factor: float) -> list[tuple[int, float]]:
    """Return the slow ranks, the slowest first, each with how many times the median of its peers it takes.

    Args:
        seconds: by rank. peers: the ranks that do equal work, each group with two or more.
    """
    found = []
    for group in peers:
        middle = median_low([seconds[rank] for rank in group])  # of two, the faster
        for rank in group:
            if seconds[rank] > factor * middle and seconds[rank] - middle > _LEAST_S:
                found.append((rank, seconds[rank] / max(middle, 1e-9)))
    return sorted(found, key=lambda each: -each[1])


def _peers(trainer: L.Trainer) -> list[list[int]]:
    everybody = list(range(trainer.world_size))
    if not isinstance(trainer.strategy, Training) or trainer.strategy.layout.pp in (1, trainer.world_size):
        return [everybody]
    layout = trainer.strategy.layout
    return [[rank for rank in everybody if layout.coordinates(rank).pp == pp] for pp in range(layout.pp)]
