"""Published checkpoints, sent to where they outlive the cluster."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from kenotron.callbacks.checkpoint_io import AsyncCheckpointIO
from kenotron.callbacks.preemption import Preemption
from kenotron.checkpoint import CheckpointError, is_checkpoint
from kenotron.checkpoint.format import MANIFEST
from kenotron.checkpoint.remote import RemoteFolder
from kenotron.checkpoint.retention import remove_checkpoint
from kenotron.strategies.persistence import Persistence


class Upload(L.Callback):
    """Send each published checkpoint to a URL that fsspec knows, in a thread, while training goes on.

    A thread on rank 0 (on each node's first rank where ``node_local`` is set, to ``url/node-N``) looks into the folders of
    ``ModelCheckpoint`` and ``Preemption`` and sends what is published there and not yet at the URL, the oldest first. So what
    a run that died has left is sent by the next one. The manifest comes last: what can be seen there is complete. The thread
    runs no collective. Whatever the target does, training goes on: what fails is warned of and tried again, after twice the
    time, and stays on this machine. ``Upload.fetch(url, path)``, or ``kenotron checkpoint fetch``, brings one back.

    Args:
        url: a folder, such as ``s3://bucket/run``. Credentials and the like are fsspec's business.
        keep: so many stay at the URL, the last ones; ``None``: all. What others have put there is never removed.
        delete_local: remove what has arrived from this machine, save the last one published in each folder.
        every_s: how often to look for new ones.
        retry_s, max_retry_s: how long to wait after a failure, at first and at most.
        drain_timeout_s: how long the end of ``fit`` waits for what is still to be sent.
        exception_timeout_s: the same where an exception (a preemption, for one) ends it.

    Raises:
        ValueError: no URL, numbers out of range; at set-up a strategy whose checkpoints are single files.
        ImportError: fsspec, or what it needs for this URL, is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: int | None = None,
        delete_local: bool = False,
        every_s: float = 2.0,
        retry_s: float = 1.0,
        max_retry_s: float = 300.0,
        drain_timeout_s: float = 600.0,
        exception_timeout_s: float = 20.0,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: the last checkpoint always stays. Set 1 or more, or None for all.")
        if every_s <= 0 or not 0 < retry_s <= max_retry_s or drain_timeout_s < 0 or exception_timeout_s < 0:
            raise ValueError(
                f"every_s={every_s}, retry_s={retry_s}, max_retry_s={max_retry_s}, drain_timeout_s={drain_timeout_s}, "
                f"exception_timeout_s={exception_timeout_s}: all are seconds, positive or (the time-outs) 0, and retry_s is at "
                "most max_retry_s."
            )
        RemoteFolder(url)
        self._url, self._keep, self._delete_local = url.rstrip("/"), keep, delete_local
        self._every_s, self._retry_s, self._max_retry_s = every_s, retry_s, max_retry_s
        self._drain_timeout_s, self._exception_timeout_s = drain_timeout_s, exception_timeout_s
        self._sender: _Sender | None = None

    @staticmethod
    def fetch(url: str, path: str | os.PathLike[str], name: str | None = None) -> Path:
        """Bring a checkpoint from a URL to ``path``, the last one by default, and return where it is."""
        return RemoteFolder(url).fetch(path, name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse checkpoints that are no directories: whether a file is complete can't be told."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, Persistence) and not isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                f"Upload sends Kénotron's checkpoints, and {type(strategy).__name__} with "
                f"{type(strategy.checkpoint_io).__name__} makes others. Set plugins=[AsyncCheckpointIO()], or "
                "strategy='kenotron'."
            )
        if not trainer.checkpoint_callbacks and not _preemptions(trainer):
            raise ValueError("Upload sends what ModelCheckpoint or Preemption saves, and there is neither. Add one.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the thread, which begins with what an earlier run has left."""
        strategy, url = trainer.strategy, self._url
        leads = trainer.is_global_zero
        if isinstance(strategy, Persistence):
            leads = strategy.leads_checkpoints
            if strategy.checkpoint_node is not None:
                url += f"/node-{strategy.checkpoint_node}"
        if leads:
            self._sender = _Sender(self, _targets(trainer, url))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log what has arrived since the last batch."""
        self._log(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send the rest: by now the strategy has published all."""
        self._end(trainer, self._drain_timeout_s)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Send what can be sent in a short time."""
        self._end(trainer, self._exception_timeout_s)

    def _log(self, trainer: L.Trainer) -> None:
        while self._sender is not None and self._sender.arrived:
            num_bytes, seconds = self._sender.arrived.pop(0)
            for logger in trainer.loggers:
                values = {"upload/megabytes": num_bytes / 1e6, "upload/seconds": seconds}
                logger.log_metrics(values, step=trainer.global_step)

    def _end(self, trainer: L.Trainer, timeout_s: float) -> None:
        if self._sender is None:
            return
        left = self._sender.drain(timeout_s)
        self._log(trainer)
        self._sender = None
        if left:
            warnings.warn(
                f"{len(left)} checkpoints are not at {self._url} yet: {', '.join(map(str, left))}. They stay here; the next "
                "fit with Upload sends them.",
                stacklevel=2,
            )


def _preemptions(trainer: L.Trainer) -> list[Preemption]:
    return [each for each in trainer.callbacks if isinstance(each, Preemption)]  # type: ignore[attr-defined]


def _targets(trainer: L.Trainer, url: str) -> list[tuple[Path, RemoteFolder]]:
    """Return each local folder with where its checkpoints go: the URL, or folders in it where there are several."""
    folders = [
        Path(each.dirpath) for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.dirpath
    ]
    folders += [each.folder(trainer) for each in _preemptions(trainer)]
    distinct = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))
    if len(distinct) == 1:
        return [(distinct[0], RemoteFolder(url))]
    names = [folder.name for folder in distinct]
    return [
        (folder, RemoteFolder(f"{url}/{folder.name}{f'-{i}' if names.count(folder.name) > 1 else ''}"))
        for i, folder in enumerate(distinct)
    ]


class _Sender:
    """The thread that sends.

    Attributes:
        arrived: ``(bytes, seconds)`` of what has arrived, for the main thread to take.
    """

    def __init__(self, settings: Upload, targets: list[tuple[Path, RemoteFolder]]) -> None:
        self.arrived: list[tuple[int, float]] = []
        self._settings, self._targets = settings, targets
        self._done: set[tuple[Path, int]] = set()
        self._is_ending, self._has_to_end, self._wake = False, False, threading.Event()
        # A target that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="kenotron-upload", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> list[Path]:
        """Send what is left and end the thread. Returns what could not be sent in time."""
        self._is_ending = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._has_to_end = True
        self._wake.set()
        return [path for path, _ in self._waiting()] if self._thread.is_alive() else []

    def _work(self) -> None:
        settings, num_failures = self._settings, 0
        while not self._has_to_end:
            is_last_look = self._is_ending
            try:
                self._send_all()
            except Exception as error:
                num_failures += 1
                pause = min(settings._retry_s * 2.0 ** (num_failures - 1), settings._max_retry_s)
                warnings.warn(
                    f"{settings._url} can't be reached ({type(error).__name__}: {error}); try {num_failures}, the next in "
                    f"{pause:.3g} s. Training goes on, and the checkpoints stay here.",
                    stacklevel=1,
                )
            else:
                if is_last_look:
                    return
                num_failures, pause = 0, settings._every_s
            if not self._is_ending or is_last_look:  # told to end meanwhile it looks again at once
                self._wake.wait(pause)
                self._wake.clear()

    def _waiting(self) -> list[tuple[Path, RemoteFolder]]:
        """Return what is published and not known to have arrived, the oldest first."""
        found = []
        for folder, remote in self._targets:
            found += [(stamp, path, remote) for stamp, path in _published(folder) if (path, stamp) not in self._done]
        return [(path, remote) for _, path, remote in sorted(found, key=lambda each: each[:2])]

    def _send_all(self) -> None:
        for path, remote in self._waiting():
            if self._has_to_end:
                return
            began = time.perf_counter()
            try:
                stamp = (path / MANIFEST).stat().st_mtime_ns
                num_bytes = remote.send(path)
            except (OSError, CheckpointError):
                if is_checkpoint(path):
                    raise
                warnings.warn(
                    f"{path} was removed before it had been sent to {remote.url}. Let ModelCheckpoint keep more (save_top_k).",
                    stacklevel=1,
                )
                remote.remove(path.name)
                continue
            self._done.add((path, stamp))
            if num_bytes:
                self.arrived.append((num_bytes, time.perf_counter() - began))
            self._retain(remote)

    def _retain(self, remote: RemoteFolder) -> None:
        """Remove what need not be kept, there and here."""
        if self._settings._keep is not None:
            for name in remote.names()[: -self._settings._keep]:
                remote.remove(name)
        if self._settings._delete_local:
            for folder, own in self._targets:
                for stamp, path in _published(folder)[:-1] if own is remote else ():
                    if (path, stamp) in self._done:
                        remove_checkpoint(path)


def _published(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder, each with when it was written, the oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            if not path.is_symlink() and is_checkpoint(path):
                found.append(((path / MANIFEST).stat().st_mtime_ns, path))
        except OSError:  # removed at this moment
            continue
    return sorted(found)
