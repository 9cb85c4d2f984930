"""Save while training goes on: ``save`` returns at once, ``fence`` holds back the update until all has been copied.

1. main thread, ``save``: encode the state; lay out the shard; hand the native engine the addresses (``engine.hpp``).
   What may change at any time is copied now. All else is lazy: it changes in optimizer steps alone.
2. engine's threads: copy into the pool, sum, write. Meanwhile forward and backward run.
3. main thread, ``fence``, after the closure and before the optimizer changes anything: wait until all has been copied,
   not written. A snapshot whose sources have changed all the same is torn, and copied anew here.
4. worker, one Python thread that mostly waits: the protocol of ``save.py`` for one save after the other, so that they are
   published, and what is removed is removed, in the order of the calls.
5. main thread, at the next ``save`` or at ``wait``: raise what went wrong.

Sources are held until they have been copied. Between 1 and 3 nobody else must change them: ``OptimizerGuard`` calls
``fence`` for every optimizer of torch.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kenotron.callbacks_native import Engine, Snapshot
from kenotron.checkpoint.engine import EngineSettings
from kenotron.checkpoint.errors import CheckpointError, SaveFailedError
from kenotron.checkpoint.format import LocalTensor, ShardLayout
from kenotron.checkpoint.guard import OptimizerGuard
from kenotron.checkpoint.manifest import is_checkpoint
from kenotron.checkpoint.nodes import Nodes
from kenotron.checkpoint.removal import check_place, remove_checkpoint
from kenotron.checkpoint.save import Checksums, SaveAttempt, check_replaceable, remove_tree
from kenotron.checkpoint.sources import Sources
from kenotron.durable import copy_durably

#: How long an interpreter that ends without ``close`` waits for what is in flight.
_EXIT_TIMEOUT_S = 600.0
#: Ranks of a node call at the same time, and share its processors: what goes on behind a call begins when all have returned.
_CALLS_OF_ALL_RANKS_S = 0.01
#: How often a fence that waits lets Python handle signals.
_SIGNALS_EVERY_S = 0.2


class PendingSave:
    """A save that was begun.

    Attributes:
        path: where the checkpoint will stand.
        stats: filled as it goes on: ``num_bytes``, ``call_s`` (time until ``save`` returned), ``staged_s``, ``written_s``,
            ``durable_s`` (each since the call), ``fence_s`` (time that fences waited), ``waited_for_room_s`` (that
            copying stood still because the pool was full), ``num_restaged`` (how often it was found torn).
    """

    def __init__(self, attempt: SaveAttempt) -> None:
        self.path = attempt.path
        self.attempt = attempt
        self.stats: dict[str, float] = {}
        self.error: BaseException | None = None
        self.num_late_steps = 0  # optimizer steps between the call and what is copied: none, unless a fence was left out
        self._num_late_steps_copied = 0
        self._began = time.perf_counter()
        self._ended = threading.Event()
        self._settling = threading.Lock()
        self._is_settled = threading.Event()
        self._snapshot: Snapshot | None = None
        self._sources: Sources | None = None
        self._has_eager = False
        self._same: PendingSave | None = None
        self._identity: object = None
        self._written: tuple[Path, Checksums, str] | None = None  # the shard's final path, its checksums, who wrote it

    def done(self) -> bool:
        """Tell whether it has come to its end, good or bad."""
        return self._ended.is_set()

    def take(
        self, engine: Engine, layout: ShardLayout, num_fences: int, before: PendingSave | None, head_start_s: float
    ) -> None:
        """Begin to copy what the layout's entries hold.

        Args:
            head_start_s: how much later than the call, unless a fence comes first.
            num_fences: that there have been; between two of them lazy tensors stay the same.
            before: the former save. Where all is the same, what it wrote is linked to, as when
                ``ModelCheckpoint(save_last=True)`` saves each checkpoint under two names.
        """
        sources = Sources(layout.entries)
        self._identity = None if sources.identity is None else (num_fences, layout.plan, len(layout.header), sources.identity)
        if before is not None and self._identity is not None and before._identity == self._identity:
            self._same = before
            self._is_settled.set()
            return
        self._snapshot = engine.submit(layout.header, sources.native, sources, head_start_s)
        self._sources, self._has_eager = sources, sources.has_eager

    def wait_eager(self) -> None:
        """Return when all that may change at any time has been copied: the end of the call."""
        snapshot = self._snapshot
        if snapshot is not None and self._has_eager:
            snapshot.wait_eager()
        self.stats["call_s"] = time.perf_counter() - self._began

    def refuse(self, error: BaseException) -> None:
        """Nothing was copied: the other ranks will be told why."""
        self.error = error
        self._is_settled.set()

    @property
    def is_settled(self) -> bool:
        """Whether all has been copied and found untorn, so that the sources are nobody's business any more."""
        return self._is_settled.is_set()

    def settle(self, *, may_restage: bool) -> None:
        """Check what has been copied, and let go of the sources.

        Args:
            may_restage: the caller keeps the sources as they are, so that a torn snapshot can be copied anew.
        """
        with self._settling:
            if self._is_settled.is_set():
                return
            assert self._snapshot is not None and self._sources is not None
            while not self._snapshot.has_ended and self._is_torn():
                if not may_restage:
                    return
                warnings.warn(
                    f"The state changed while {self.path.name} was copied, without an optimizer step that could be held back: "
                    "the copy was discarded and taken again.",
                    stacklevel=2,
                )
                self._sources.look_again()
                self._num_late_steps_copied = self.num_late_steps
                self._snapshot.restage()
            self._sources = None
            self._is_settled.set()

    def _is_torn(self) -> bool:
        assert self._snapshot is not None and self._sources is not None
        is_late = self.num_late_steps != self._num_late_steps_copied
        return is_late or self._snapshot.is_torn or self._sources.have_changed()

    def write(self, file: Path, timeout_s: float) -> Checksums:
        """Write the shard durably and return its checksums; on the worker."""
        if self._same is None:
            sums, origin = self._write_new(file, timeout_s), self.attempt.save_id
        else:
            sums, origin = _link(self._same, file)
            self.attempt.origin = origin
        self._written = self.path / file.name, sums, origin
        return sums

    def _write_new(self, file: Path, timeout_s: float) -> Checksums:
        snapshot = self._snapshot
        assert snapshot is not None
        snapshot.attach(str(file))
        snapshot.wait_staged()
        self.settle(may_restage=False)
        if not self._is_settled.wait(timeout_s):
            raise SaveFailedError(f"saving {self.path}: the state changed while it was copied and was never at rest again")
        self.attempt.num_late_steps = self._num_late_steps_copied
        snapshot.finish()
        self.stats |= snapshot.stats()
        return snapshot.sums()

    def end(self, error: BaseException | None) -> None:
        """Note how it ended and drop what it held."""
        self.error = error
        if self._snapshot is not None:
            self._snapshot.cancel()  # before the lock, whose holder may be waiting for the snapshot
        with self._settling:
            self._snapshot = self._sources = self._same = None
            self._is_settled.set()
        self.stats["durable_s"] = time.perf_counter() - self._began
        self._ended.set()


def _link(before: PendingSave, file: Path) -> tuple[Checksums, str]:
    if before._written is None or before.error is not None:
        raise SaveFailedError(f"it holds the same as {before.path}, which was not saved: {before.error}")
    shard, sums, origin = before._written
    try:
        os.link(shard, file)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        copy_durably(shard, file)
    return sums, origin


class Checkpointer:
    """Saves checkpoints in the background, one after the other.

    Attributes:
        last: the save that was begun last.
        is_training: whether a guarded optimizer has stepped since the last ``close``.

    Args:
        settings: of the engine, which starts with the first save.
        on_error: what ``save`` and ``wait`` do about a save that failed earlier: ``"raise"``, or ``"warn"`` and go on.
    """

    def __init__(self, settings: EngineSettings | None = None, *, on_error: Literal["raise", "warn"] = "raise") -> None:
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'warn'")
        self.settings = settings or EngineSettings()
        self.on_error = on_error
        self.last: PendingSave | None = None
        self.is_training = False
        self._engine: Engine | None = None
        self._worker: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: list[PendingSave] = []
        self._unsettled: list[PendingSave] = []
        self._last_published: Path | None = None
        self._kept: list[Path] = []
        self._not_removed: list[Exception] = []
        self._guard: OptimizerGuard | None = None
        self._num_fences = 0
        self._folders: set[Path] = set()  # that this process has saved to
        atexit.register(_drain_at_exit, weakref.ref(self))

    def guard_optimizers(self) -> OptimizerGuard:
        """Put a fence before each step of every torch optimizer of this process, until ``close``."""
        if self._guard is None:
            self._guard = OptimizerGuard(self.fence, self._note_step)
        return self._guard

    def prepare(self, num_bytes: int) -> None:
        """Claim memory for a save of so many bytes (at most the pool's), in the background."""
        self._started().prepare(num_bytes)

    def save(
        self,
        path: str | os.PathLike[str],
        tensors: Sequence[LocalTensor],
        state: Mapping[str, Any],
        *,
        rank: int,
        world_size: int,
        save_id: str,
        rank_state: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
        timeout_s: float = 600.0,
        start_timeout_s: float | None = None,
        aliases: Mapping[str, str] | None = None,
        nodes: Nodes | None = None,
        is_lazy: Callable[[torch.Tensor], bool] = lambda tensor: False,
        ended: Callable[[], Collection[int]] = tuple,
    ) -> PendingSave:
        """Begin to save together with the other ranks, and return.

        Lazy tensors must not change before the next ``fence``; all else is copied before this returns.

        Args:
            is_lazy: as ``LocalTensor.lazy``, for tensors inside of ``state`` and ``rank_state``.
            path, tensors, state, ...: as ``kenotron.checkpoint.save``.

        Raises:
            ValueError: an argument that cannot be honoured, on the rank that got it.
            SaveFailedError: an earlier save failed (``on_error="raise"``); this one was not begun.
        """
        self._tell_errors()
        attempt = SaveAttempt(
            path,
            rank=rank,
            world_size=world_size,
            save_id=save_id,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            aliases=aliases,
            nodes=nodes,
            ended=ended,
        )
        self._start_worker()  # before anything is copied that a worker is to write
        self._folders.add(attempt.path.parent.resolve())
        pending = PendingSave(attempt)
        head_start_s = _CALLS_OF_ALL_RANKS_S if world_size > 1 else 0.0
        refused: BaseException | None = None
        layout: ShardLayout | None = None
        try:
            if attempt.leads:
                with contextlib.suppress(OSError):  # the worker looks again, and its failures are told as `on_error` says
                    check_replaceable(attempt.path)
            layout = attempt.gather(tensors, state, rank_state, allow_pickle=allow_pickle, is_lazy=is_lazy)
            pending.take(self._started(), layout, self._num_fences, self.last, head_start_s)
        except Exception as error:  # the other ranks wait for this one: they are told, and this one raises
            refused = error
            pending.refuse(error)
        else:
            if not pending.is_settled:
                self._unsettled.append(pending)

        def gathered() -> ShardLayout:
            if refused is not None:
                raise refused
            assert layout is not None
            return layout

        def run() -> None:
            former: Path | None = None
            time.sleep(head_start_s)
            try:
                former = attempt.run(gathered, lambda file, _: pending.write(file, timeout_s))
            except BaseException as error:
                pending.end(error)
            else:
                pending.end(None)
                self._last_published = attempt.path
                self._kept = [path for path in self._kept if path != attempt.path]  # it is wanted again
                if former is not None:
                    remove_tree(former)
                self._remove_kept()

        self._hand_over(run)
        if refused is not None:
            raise refused
        pending.wait_eager()
        self._open.append(pending)
        self.last = pending
        return pending

    def fence(self) -> float:
        """Return when nothing that was saved depends on its sources any more: from here on they may change.

        Returns:
            The seconds that this took.
        """
        self._num_fences += 1
        if not self._unsettled:
            return 0.0
        began = time.perf_counter()
        assert self._engine is not None
        while not self._engine.fence(_SIGNALS_EVERY_S):  # a disk may hang for ever: Ctrl-C must not
            pass
        for pending in self._unsettled:
            pending.settle(may_restage=True)
        seconds = time.perf_counter() - began
        for pending in self._unsettled:
            pending.stats["fence_s"] = pending.stats.get("fence_s", 0.0) + seconds
        self._unsettled.clear()
        return seconds

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint after all saves that were begun before, and never the last one that was published."""
        target = Path(os.path.abspath(path))

        def run() -> None:
            check_place(target, self._folders)
            self._kept.append(target)
            self._remove_kept()

        self._hand_over(run)

    def wait(self) -> None:
        """Return when all saves are published and all removals done.

        Raises:
            SaveFailedError: a save failed (``on_error="raise"``).
        """
        self._drain()
        self._tell_errors()

    def finish_within(self, timeout_s: float) -> None:
        """Give saves that have been copied some time to come to their end; from any thread, and without an error."""
        if self._worker is not None:
            reached = threading.Event()
            self._jobs.put(reached.set)
            reached.wait(timeout_s)

    def close(self, *, others_timeout_s: float | None = None) -> None:
        """Wait, and stop all threads. The next save starts them again.

        Args:
            others_timeout_s: where other ranks may be dead: how much longer than this rank needs they may need.

        Raises:
            SaveFailedError: as ``wait``.
        """
        if others_timeout_s is not None:
            for pending in self._open:
                pending.attempt.hurry(others_timeout_s)
        self._drain()
        if self._worker is not None:
            self._jobs.put(None)
            self._worker.join()
        self._worker = self._engine = None
        if self._guard is not None:
            self._guard.remove()
        self._guard, self.is_training = None, False
        self._tell_errors()

    # ---------------------------------------------------------------------------------------------------------- parts

    def _note_step(self) -> None:
        """After an optimizer step: what is not settled yet was changed by it, since no fence came before."""
        self.is_training = True
        for pending in self._unsettled:
            pending.num_late_steps += 1
        if self._unsettled:
            self.fence()

    def _started(self) -> Engine:
        if self._engine is None:
            self._engine = self.settings.start()
        return self._engine

    def _start_worker(self) -> None:
        if self._worker is None:
            worker = threading.Thread(target=_work, args=(self._jobs,), name="kenotron-checkpoint", daemon=True)
            worker.start()  # raises where the system allows no more threads: then there is none to wait for
            self._worker = worker

    def _hand_over(self, job: Callable[[], None]) -> None:
        self._start_worker()

        def run() -> None:
            try:
                job()
            except Exception as error:  # of a removal; saves keep theirs. The thread must live: others wait for it
                self._not_removed.append(error)

        self._jobs.put(run)

    def _drain(self, timeout_s: float | None = None) -> None:
        self.fence()
        if self._worker is not None:
            reached = threading.Event()
            self._jobs.put(reached.set)
            reached.wait(timeout_s)

    def _tell_errors(self) -> None:
        """Report each failure once."""
        failed = [pending for pending in self._open if pending.done() and pending.error is not None]
        self._open = [pending for pending in self._open if not pending.done()]
        not_removed, self._not_removed = self._not_removed, []
        for error in not_removed:
            warnings.warn(f"a checkpoint that is no longer wanted was not removed: {error}", stacklevel=3)
        for pending in failed:
            if self.on_error == "raise":
                raise _telling(pending)
            warnings.warn(f"a checkpoint was not saved, training goes on: {pending.error}", stacklevel=3)

    def _remove_kept(self) -> None:
        """Remove all that was to be removed, save what is still the last one that was published."""
        kept, self._kept = self._kept, []
        for path in kept:
            if path == self._last_published or (self._last_published is None and is_checkpoint(path)):
                self._kept.append(path)
                continue
            try:
                remove_checkpoint(path)
            except OSError as error:
                self._not_removed.append(error)


def _telling(pending: PendingSave) -> BaseException:
    error = pending.error
    if isinstance(error, CheckpointError | ValueError):
        return error
    failure = SaveFailedError(f"saving {pending.path} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # and all that it holds, before waiting for the next


def _drain_at_exit(reference: weakref.ref[Checkpointer]) -> None:
    checkpointer = reference()
    if checkpointer is not None:
        checkpointer._drain(_EXIT_TIMEOUT_S)
