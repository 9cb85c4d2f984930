"""What a user sets of the native engine, which copies and writes snapshots (``engine.hpp``)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch

from kenotron.callbacks_native import Engine


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the native engine may use.

    Args:
        pool_bytes: memory through which all checkpoints pass; claimed when a save first needs it, and kept. With as much
            as the state has, the fence waits for memory alone; with less, also for the disk.
        slot_bytes: what is copied and written at a time: a multiple of 4096.
        num_copiers: threads that copy; None for two where training computes on a GPU or on more than one core, so that its
            threads, which wait for each other, are slowed alike, and one device's copies go on while another's end is waited
            for; otherwise one.
        num_writers: threads that write.
        niceness: of these threads, as of ``nice``; 0 to 19.
        cpus: that they may run on; empty for all.
        max_bytes_per_s: over all writers of this process; None for no limit.
        direct: write past the page cache (``O_DIRECT``) where the file system can.
        checked_share: of the bytes, a part of each page, read at the call: a change before the copy is then found out; 0 to 1.
            With 1 any change is, and the call takes as long as reading all takes.

    Raises:
        ValueError: a number out of its range.
    """

    pool_bytes: int = 256 << 20
    slot_bytes: int = 8 << 20
    num_copiers: int | None = None
    num_writers: int = 2
    niceness: int = 5
    cpus: tuple[int, ...] = ()
    max_bytes_per_s: float | None = None
    direct: bool = True
    checked_share: float = 1 / 64

    def __post_init__(self) -> None:
        if self.slot_bytes < 4096 or self.slot_bytes % 4096:
            raise ValueError(f"slot_bytes={self.slot_bytes} must be a multiple of 4096; set {8 << 20}")
        if self.pool_bytes < self.slot_bytes:
            raise ValueError(f"pool_bytes={self.pool_bytes} must be at least slot_bytes={self.slot_bytes}; set {256 << 20}")
        for name, number in (("num_copiers", self._copiers), ("num_writers", self.num_writers)):
            if number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        if not 0 <= self.niceness <= 19:
            raise ValueError(f"niceness={self.niceness} must be 0 to 19; 5 steps aside for training")
        if not 0 <= self.checked_share <= 1:
            raise ValueError(f"checked_share={self.checked_share} must be 0 to 1; set 1 / 64")
        if self.max_bytes_per_s is not None and self.max_bytes_per_s <= 0:
            raise ValueError(f"max_bytes_per_s={self.max_bytes_per_s} must be positive, or None for no limit")
        if any(cpu < 0 or cpu >= (os.cpu_count() or 1) for cpu in self.cpus):
            raise ValueError(f"cpus={self.cpus} must be numbers from 0 to {(os.cpu_count() or 1) - 1}")

    def start(self) -> Engine:
        """Return an engine with these settings, its threads running."""
        fields = dataclasses.asdict(self) | {
            "num_copiers": self._copiers,
            "cpus": list(self.cpus),
            "max_bytes_per_second": self.max_bytes_per_s or 0.0,
        }
        del fields["max_bytes_per_s"]
        return Engine(**fields)

    @property
    def _copiers(self) -> int:
        if self.num_copiers is not None:
            return self.num_copiers
        return 2 if torch.cuda.is_initialized() or torch.get_num_threads() > 1 else 1
