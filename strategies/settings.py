"""Settings of the strategy that few need, in small groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, kw_only=True)
class ProcessGroupSettings:
    """How ranks talk.

    Args:
        backend: of ``torch.distributed``; ``None`` takes NCCL on CUDA and gloo on CPU.
        timeout: after which a collective that others do not join fails.
    """

    backend: str | None = None
    timeout: timedelta = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How checkpoints are written.

    Args:
        allow_pickle: also keep values that only pickle can hold, apart and marked. Loading them runs code from the file.
        timeout_s: how long the ranks wait for each other while saving.
        exception_timeout_s: the same for a save while an exception is handled, where other ranks may be gone.
    """

    allow_pickle: bool = False
    timeout_s: float = 1800.0
    exception_timeout_s: float = 5.0
