"""Settings of the strategy that few need, in small groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from kenotron.checkpoint import EngineSettings


@dataclass(frozen=True, kw_only=True)
class ProcessGroupSettings:
    """How ranks talk.

    Args:
        backend: of ``torch.distributed``; ``None`` takes NCCL on CUDA and gloo on CPU.
        timeout: after which a collective that others do not join fails.
        start_method: how one process starts the others of its node, where no launcher has: ``"popen"`` runs the script again;
            ``"spawn"``, ``"fork"`` (notebooks) and ``"forkserver"`` run the trainer's call alone in new processes, and give its
            results, metrics and weights back to this one.
    """

    backend: str | None = None
    timeout: timedelta = timedelta(minutes=30)
    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen"

    def __post_init__(self) -> None:
        if self.start_method not in ("popen", "spawn", "fork", "forkserver"):
            raise ValueError(f"start_method={self.start_method!r} must be 'popen', 'spawn', 'fork' or 'forkserver'")


@dataclass(frozen=True, kw_only=True)
class AutoSettings:
    """What the planner is told where settings are ``"auto"``.

    Args:
        sequence_length: tokens of a sample; ``None``: as many as the model has positions, 2048 at most.
        global_batch_size: samples of an update over all ranks; ``None``: 8 for each rank and accumulated batch. The
            loader's batch is to follow ``strategy.layout.dp_size``, as ``TokenData`` does it.
        memory_gb: of a device, for tensors; ``None``: what the hardware has, less a reserve.
    """

    sequence_length: int | None = None
    global_batch_size: int | None = None
    memory_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How checkpoints are written.

    Args:
        allow_pickle: keep values that only pickle can hold (hyper-parameters, states of callbacks), apart and marked; what
            can't be pickled is left out with a warning. False refuses both. Only ``weights_only=False`` loads them.
        timeout_s: how long the ranks wait for each other while saving.
        exception_timeout_s: the same for a save while an exception is handled, where other ranks may be gone.
        asynchronous: write while training goes on. A checkpoint is then seen when it is complete, some time after the call;
            the end of ``fit`` waits for it. It holds what was there at the call, whatever runs afterwards. Before the first
            optimizer step and after ``fit`` every save is waited for.
        on_error: what a save that failed in the background does: ``"raise"`` at the next save or at the end of ``fit``, or
            ``"warn"`` and train on.
        node_local: the nodes share no file system, or have faster disks of their own: each stores what its ranks hold, all
            publish or none does. To load on another layout, bring the parts together: ``kenotron checkpoint merge``.
        engine: memory, threads and bandwidth that writing may use.
    """

    allow_pickle: bool = True
    timeout_s: float = 1800.0
    exception_timeout_s: float = 5.0
    asynchronous: bool = True
    on_error: Literal["raise", "warn"] = "raise"
    node_local: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)
