"""A signal that the job has to go: one more checkpoint, a clean end, and back into the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from kenotron.parallel._torch import default_store
from kenotron.ranks import RankMonitor
from kenotron.strategies.persistence import Persistence

_SCONTROL_TIMEOUT_S = 60.0


class Preempted(SystemExit):
    """Training was stopped by a signal, and its checkpoint stands at ``path``. Ends the process unless it is caught.

    Args:
        path: of the checkpoint. code: of the process.
    """

    def __init__(self, path: Path, code: int) -> None:
        super().__init__(code)
        self.path = path


class Preemption(L.Callback):
    """Save a checkpoint when a signal comes, and stop: all ranks after the same optimizer step, whichever rank got it.

    The handler notes the signal; a thread of each rank looks at the job's key-value store twice a second and agrees with the
    others on the step (``kenotron.ranks``), so that steps cost no collective. Then all save, wait until the checkpoint is
    published, and raise :class:`Preempted` out of ``fit``. With ``ModelCheckpoint`` in the trainer,
    ``fit(ckpt_path="last")`` goes on from there.

    For the signals that are named here it takes the place of Lightning's handlers, which under SLURM would save in the middle
    of a step. Any strategy that can save will do.

    Args:
        dirpath: where ``last-preempted-step=N.ckpt`` goes; ``None``: to the first ``ModelCheckpoint``'s, or to ``checkpoints``
            in ``default_root_dir``.
        signals: that are obeyed, as numbers or names.
        requeue: ``True``: run ``scontrol requeue`` when the checkpoint is published. ``"auto"``: where Lightning's
            ``SLURMEnvironment`` would have done so, that is for its ``requeue_signal``.
        exit_code: of the process. ``torchrun`` takes 0 for the end of the job, and restarts it for any other.

    Raises:
        ValueError: signals that can't be caught; ``requeue=True`` outside of a SLURM job; a thread other than the main one.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        signals: Sequence[str | int] = ("SIGTERM", "SIGUSR1"),
        *,
        requeue: bool | Literal["auto"] = "auto",
        exit_code: int = 0,
    ) -> None:
        if not 0 <= exit_code <= 255:
            raise ValueError(f"exit_code={exit_code}: it is 0 to 255.")
        if requeue not in (True, False, "auto"):
            raise ValueError(f"requeue={requeue!r}: set True, False or 'auto'.")
        self._dirpath = None if dirpath is None else Path(dirpath)
        self._signals = [_signal(each) for each in ([signals] if isinstance(signals, (str, int)) else signals)]
        if not self._signals:
            raise ValueError("signals is empty: name at least one, such as 'SIGTERM', or leave the callback out.")
        self._requeue, self._exit_code = requeue, exit_code
        self._former: dict[signal.Signals, Any] = {}
        self._monitor: RankMonitor | None = None
        self._received: signal.Signals | None = None
        self._last_step = -1
        self._pid = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what can't be honoured when the signal comes."""
        if stage != "fit":
            return
        if self._requeue is True and _slurm_job() is None:
            raise ValueError(
                "Preemption(requeue=True): this is no SLURM job, SLURM_JOB_ID is not set. Set requeue='auto', which requeues "
                "under SLURM alone."
            )
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("Preemption handles signals, which only the main thread can. Call fit there, or leave it out.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals, after Lightning has set its own handlers."""
        self._received, self._last_step, self._pid = None, trainer.global_step, os.getpid()
        if trainer.world_size > 1:
            name = trainer.strategy.broadcast(uuid.uuid4().hex)
            self._monitor = RankMonitor(default_store(), trainer.global_rank, trainer.world_size, name=f"preemption-{name}")
        for each in self._signals:
            self._former[each] = signal.signal(each, self._handle)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """After an optimizer step: stop if all agree to do so after this one."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._monitor.boundary() if self._monitor is not None else self._received is not None:
            self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        if self._monitor is not None:
            trainer.strategy.barrier()  # a rank that still waits at a boundary needs the other threads' answer
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        if self._monitor is not None and isinstance(exception, Exception):
            self._monitor.report_failure(exception)
        self._let_go()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked data loader worker has inherited the handler: it just dies, as it would
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self._received = signal.Signals(signum)
        if self._monitor is not None:
            self._monitor.request_stop()

    def _stop(self, trainer: L.Trainer) -> None:
        began = time.perf_counter()
        # Lightning's ckpt_path="last" finds what begins with "last", and takes the newest.
        path = self.folder(trainer) / f"last-preempted-step={trainer.global_step}.ckpt"
        rank_zero_info(f"Preempted: saving {path} and stopping.")
        trainer.save_checkpoint(path)
        if isinstance(trainer.strategy, Persistence):
            trainer.strategy.checkpointer.wait()
        trainer.strategy.checkpoint_io.teardown()  # which is how those that write in the background are waited for
        trainer.strategy.barrier()
        for logger in trainer.loggers:
            logger.log_metrics({"preemption/save_seconds": time.perf_counter() - began}, step=trainer.global_step)
        if self._shall_requeue(trainer) and trainer.is_global_zero:
            _requeue()
        raise Preempted(path, self._exit_code)

    def folder(self, trainer: L.Trainer) -> Path:
        """Return where checkpoints go, once training has begun."""
        folders = [each.dirpath for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.dirpath]
        return self._dirpath or Path(folders[0] if folders else Path(trainer.default_root_dir) / "checkpoints")

    def _shall_requeue(self, trainer: L.Trainer) -> bool:
        """Tell whether to requeue; all ranks call it, since the signal may have come to any of them."""
        if self._requeue != "auto":
            return bool(self._requeue)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue or _slurm_job() is None:
            return False
        # Not for SIGTERM, by which scancel ends a job for good.
        return trainer.strategy.reduce_boolean_decision(self._received == environment.requeue_signal, all=False)

    def _let_go(self) -> None:
        for each, former in self._former.items():
            if signal.getsignal(each) == self._handle:
                signal.signal(each, former)
        self._former = {}
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


def _signal(value: str | int) -> signal.Signals:
    try:
        found = signal.Signals[value] if isinstance(value, str) else signal.Signals(value)
    except (KeyError, ValueError):
        raise ValueError(f"signals: {value!r} is no signal. Name one such as 'SIGTERM', 'SIGUSR1' or 'SIGUSR2'.") from None
    if found in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"signals: no process can catch {found.name}. Let the scheduler send SIGTERM or SIGUSR1 before it.")
    return found


def _slurm_job() -> str | None:
    """Return how SLURM calls this job, a task of an array included."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _requeue() -> None:
    job = _slurm_job()
    assert job is not None
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=_SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        rank_zero_warn(f"scontrol requeue {job} failed: {said}. The checkpoint is there; submit the job again.")
    else:
        rank_zero_info(f"Requeued SLURM job {job}.")
