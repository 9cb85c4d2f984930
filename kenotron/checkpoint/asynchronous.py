"""Save while training goes on: ``save`` returns at once, ``fence`` holds back the update until all has been copied.

1. main thread, ``save``: encode the state; lay out the shard; hand the native engine the addresses (``engine.hpp``).
   What may change at any time is copied now. All else is lazy: it changes in optimizer steps alone, and has its fingerprint
   taken.
2. engine's threads: copy into the pool, sum, write. Meanwhile forward and backward run.
3. main thread, ``fence``, after the closure and before the optimizer changes anything: wait until all has been copied,
   not written. What is not what it was at the call makes the save fail, and is copied in the call from then on.
4. worker, one Python thread that mostly waits, and ends with its last job: the protocol of ``save.py`` for one save after the
   other, so that they are published, and what is removed is removed, in the order of the calls.
5. main thread, at the next ``save`` or at ``wait``: raise what went wrong.

Sources are held until they have been copied. Between 1 and 3 nobody else is to change them: ``OptimizerGuard`` calls
``fence`` for every optimizer of torch, and watches in a run's first steps whether anything else does. Whoever knows of code
that may, such as hooks of callbacks, calls ``fence`` before it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kenotron.callbacks_native import Engine
from kenotron.checkpoint.engine import EngineSettings
from kenotron.checkpoint.errors import CheckpointError, SaveFailedError
from kenotron.checkpoint.format import LocalTensor, ShardEntry, ShardLayout
from kenotron.checkpoint.guard import OptimizerGuard
from kenotron.checkpoint.manifest import is_checkpoint
from kenotron.checkpoint.nodes import Nodes
from kenotron.checkpoint.pending import PendingSave
from kenotron.checkpoint.removal import check_place
from kenotron.checkpoint.retention import Retention
from kenotron.checkpoint.save import SaveAttempt, check_replaceable, remove_tree
from kenotron.checkpoint.worker import Worker

#: How long an interpreter that ends without ``close`` waits for what is in flight.
_EXIT_TIMEOUT_S = 600.0
#: Ranks of a node call at the same time, and share its processors: what goes on behind a call begins when all have returned.
_CALLS_OF_ALL_RANKS_S = 0.01
#: How often a fence that waits lets Python handle signals.
_SIGNALS_EVERY_S = 0.2
#: All of this process: whoever opens a path waits for the save that is to publish it.
_LIVING: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


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
        self._worker = Worker()
        self._open: list[PendingSave] = []
        self._unsettled: list[PendingSave] = []
        self._retention = Retention()
        self._not_removed: list[Exception] = []
        self._guard: OptimizerGuard | None = None
        self._num_fences = 0
        self._folders: set[Path] = set()  # that this process has saved to
        self._at_next_fence: list[Callable[[], object]] = []
        self._expected: dict[str, tuple[bool, object]] = {}  # path -> whether one will stand there, and what makes it so
        atexit.register(_drain_at_exit, weakref.ref(self))
        _LIVING.add(self)

    def guard_optimizers(self) -> OptimizerGuard:
        """Put a fence before each step of every torch optimizer of this process, until ``close``."""
        if self._guard is None:
            self._guard = OptimizerGuard(self.fence, self._note_step)
        return self._guard

    def lazy_tensors(self) -> Callable[[torch.Tensor], bool]:
        """Return a function that tells which tensors change in steps of guarded optimizers alone; without a guard, none."""
        return (lambda tensor: False) if self._guard is None else self._guard.lazy_tensors()

    def at_next_fence(self, call: Callable[[], object]) -> None:
        """Call something once, when the next fence begins."""
        self._at_next_fence.append(call)

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
        stored: Mapping[int, str] | None = None,
        ended: Callable[[], Collection[int]] = tuple,
    ) -> PendingSave:
        """Begin to save together with the other ranks, and return.

        Lazy tensors must not change before the next ``fence``; all else is copied before this returns.

        Args:
            is_lazy: as ``LocalTensor.lazy``, for tensors inside of ``state`` and ``rank_state``.
            stored: by ``id``, parameters that are saved whole, and under which names: pickles refer to them.
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
        with self._worker.announced():  # before anything is copied that a worker is to write
            gather = functools.partial(
                attempt.gather, tensors, state, rank_state, allow_pickle=allow_pickle, is_lazy=is_lazy, stored=stored
            )
            return self._begin(attempt, gather, _CALLS_OF_ALL_RANKS_S if world_size > 1 else 0.0)

    def _begin(self, attempt: SaveAttempt, gather: Callable[[], ShardLayout], head_start_s: float) -> PendingSave:
        """Copy what must be copied in the call, and hand the rest to the worker."""
        self._folders.add(attempt.path.parent.resolve())
        pending = PendingSave(attempt, self._distrust)
        refused: BaseException | None = None
        layout: ShardLayout | None = None
        try:
            if attempt.leads:
                with contextlib.suppress(OSError):  # the worker looks again, and its failures are told as `on_error` says
                    check_replaceable(attempt.path)
            layout = gather()
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
                former = attempt.run(gathered, lambda file, _: pending.write(file))
            except BaseException as error:
                self._came_true(attempt.path, pending)
                pending.end(error)
            else:
                self._came_true(attempt.path, pending)
                pending.end(None)
                if former is not None:
                    remove_tree(former)
                self._not_removed += self._retention.published(attempt.path)

        if refused is None:
            self._expected[str(attempt.path)] = True, pending
        self._hand_over(run)
        if refused is not None:
            raise refused
        pending.wait_eager()
        self._open.append(pending)
        self.last = pending
        return pending

    def fence(self) -> float:
        """Return when nothing that was saved depends on its sources any more: from here on they may change.

        Whoever runs code that may change them, other than an optimizer's step, calls it before.

        Returns:
            The seconds that this took.
        """
        self._num_fences += 1
        wanted, self._at_next_fence = self._at_next_fence, []
        for call in wanted:
            call()
        if not self._unsettled:
            return 0.0
        began = time.perf_counter()
        assert self._engine is not None
        while not self._engine.fence(_SIGNALS_EVERY_S):  # a disk may hang for ever: Ctrl-C must not
            pass
        for pending in self._unsettled:
            pending.settle()
        seconds = time.perf_counter() - began
        for pending in self._unsettled:
            pending.stats["fence_s"] = pending.stats.get("fence_s", 0.0) + seconds
        self._unsettled.clear()
        return seconds

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint after all saves that were begun before, if the last of them takes its place.

        Where that one fails, it stays; so does the last one that was published, unless it is the last that was begun as well.
        """
        target, successor = Path(os.path.abspath(path)), self.last
        # What was saved last is removed for its own sake (a tuner's copy): nothing is to take its place.
        at_once = successor is not None and successor.path == target

        def run() -> None:
            self._came_true(target, run)
            if os.path.lexists(target):  # what isn't there needs no removing, whoever it would belong to
                check_place(target, self._folders)
            failed = None if successor is None or successor.error is None else successor.path
            self._not_removed += self._retention.remove(target, failed, at_once=at_once)

        self._expected[str(target)] = False, run
        self._hand_over(run)

    def adopt(self, folder: str | os.PathLike[str]) -> None:
        """Let checkpoints in a folder be removed though this process has saved none there."""
        self._folders.add(Path(folder).resolve())

    def will_stand_at(self, path: str | os.PathLike[str]) -> bool | None:
        """Tell whether a checkpoint will stand at ``path`` when all that was begun has come to its end, if all goes well.

        ``None``: nothing that is under way changes it.
        """
        expected = self._expected.get(os.path.abspath(path))
        return None if expected is None else expected[0]

    def _came_true(self, path: Path, what: object) -> None:
        if self._expected.get(str(path), (False, None))[1] is what:
            del self._expected[str(path)]

    def keep_what_replaced(self, path: str | os.PathLike[str]) -> None:
        """Keep what stayed because the save as ``path`` failed, also when ``path`` is removed later."""
        self._hand_over(lambda: self._retention.forget(Path(os.path.abspath(path))))

    def wait(self) -> None:
        """Return when all saves are published and all removals done.

        Raises:
            SaveFailedError: a save failed (``on_error="raise"``).
        """
        self._drain()
        self._tell_errors()

    def wait_for(self, path: str | os.PathLike[str]) -> None:
        """Return when no save to ``path``, or to what a link there leads to, is under way any more; without an error."""
        wanted = {os.path.abspath(path), os.path.realpath(path)}
        for pending in list(self._open):
            if str(pending.path) in wanted and not pending.done():
                self.fence()
                pending.wait()

    def finish_within(self, timeout_s: float) -> None:
        """Give saves that have been copied some time to come to their end; from any thread, and without an error."""
        self._worker.wait(timeout_s)

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
        self._engine = None
        if self._guard is not None:
            self._guard.remove()
        self._guard, self.is_training = None, False
        self._tell_errors()

    # ---------------------------------------------------------------------------------------------------------- parts

    def _note_step(self) -> None:
        self.is_training = True

    def _distrust(self, changed: Sequence[ShardEntry]) -> None:
        """Copy in the call from now on what was changed by something else than a step."""
        if self._guard is not None:
            self._guard.distrust([entry.data for entry in changed])

    def _started(self) -> Engine:
        if self._engine is None:
            self._engine = self.settings.start()
        return self._engine

    def _hand_over(self, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except Exception as error:  # of a removal; saves keep theirs. The thread must live: others wait for it
                self._not_removed.append(error)

        self._worker.run(run)

    def _drain(self, timeout_s: float | None = None) -> None:
        self.fence()
        self._worker.wait(timeout_s)

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


def wait_for(path: str | os.PathLike[str]) -> bool:
    """Wait for saves of this process to ``path`` that are under way. Returns whether a checkpoint stands there then."""
    for checkpointer in list(_LIVING):
        checkpointer.wait_for(path)
    return is_checkpoint(path)


def _telling(pending: PendingSave) -> BaseException:
    error = pending.error
    if isinstance(error, CheckpointError | ValueError):
        return error
    failure = SaveFailedError(f"saving {pending.path} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _drain_at_exit(reference: weakref.ref[Checkpointer]) -> None:
    checkpointer = reference()
    if checkpointer is not None:
        checkpointer._drain(_EXIT_TIMEOUT_S)
