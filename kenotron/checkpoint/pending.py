"""One save that goes on in the background: from the copies to the shard on the disk."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kenotron.callbacks_native import Engine, Snapshot
from kenotron.checkpoint.errors import SaveFailedError
from kenotron.checkpoint.format import ShardEntry, ShardLayout
from kenotron.checkpoint.save import Checksums, SaveAttempt
from kenotron.checkpoint.sources import Sources
from kenotron.durable import copy_durably

#: So many tensors are named where an error tells of all that changed.
_MAX_NAMED = 5


class PendingSave:
    """A save that was begun.

    Attributes:
        path: where the checkpoint will stand.
        stats: filled as it goes on: ``num_bytes``, ``call_s`` (time until ``save`` returned), ``staged_s``, ``written_s``,
            ``durable_s`` (each since the call), ``fence_s`` (time that fences waited), ``waited_for_room_s`` (that
            copying stood still because the pool was full).

    Args:
        on_change: gets the entries that changed before they were copied, which then is an error.
    """

    def __init__(self, attempt: SaveAttempt, on_change: Callable[[Sequence[ShardEntry]], None]) -> None:
        self.path = attempt.path
        self.attempt = attempt
        self.stats: dict[str, float] = {}
        self.error: BaseException | None = None
        self._on_change = on_change
        self._began = time.perf_counter()
        self._ended = threading.Event()
        self._settling = threading.Lock()
        self._is_settled = threading.Event()
        self._snapshot: Snapshot | None = None
        self._sources: Sources | None = None
        self._changed: list[str] = []
        self._has_eager = False
        self._layout: object = None  # equal to that of another save whose shard is laid out alike
        self._num_fences = 0
        self._same: PendingSave | None = None
        self._written: tuple[Path, Checksums, str] | None = None  # the shard's final path, its checksums, who wrote it

    def done(self) -> bool:
        """Tell whether it has come to its end, good or bad."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Return when it has come to its end."""
        self._ended.wait()

    def take(
        self, engine: Engine, layout: ShardLayout, num_fences: int, before: PendingSave | None, head_start_s: float
    ) -> None:
        """Begin to copy what the layout's entries hold.

        Args:
            head_start_s: how much later than the call, unless a fence comes first.
            num_fences: that there have been; between two of them lazy tensors are to stay the same.
            before: the former save. Where all is proved to be the same, what it wrote is linked to, as when
                ``ModelCheckpoint(save_last=True)`` saves each checkpoint under two names.
        """
        sources = Sources(layout.entries)
        self._layout, self._num_fences = (layout.plan, len(layout.header)), num_fences
        other: Snapshot | None = None
        if before is not None and before._layout == self._layout and before._can_be_linked():
            # After a fence lazy tensors may have been changed a little, and fingerprints do not tell every byte of them.
            if sources.is_own or (before._num_fences == num_fences and not sources.has_eager):
                other = before._snapshot
        self._snapshot = engine.submit(layout.header, sources.native, sources, head_start_s, other)
        if self._snapshot.is_like_other:
            self._same = before
        self._sources, self._has_eager = sources, sources.has_eager

    def _can_be_linked(self) -> bool:
        # Until it has ended it has no final place, but will have one before the worker comes to what links to it.
        is_there = not self.done() or self._written is None or self._written[0].exists()
        return self.error is None and is_there

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
        """Whether all has been copied, so that the sources are nobody's business any more."""
        return self._is_settled.is_set()

    def settle(self) -> None:
        """Find out whether what has been copied is what was there at the call, and let go of the sources."""
        with self._settling:
            if self._is_settled.is_set():
                return
            assert self._snapshot is not None and self._sources is not None
            if not self._snapshot.has_ended and (changed := self._sources.changed(self._snapshot)):
                self._changed = [entry.name for entry in changed]
                self._on_change(changed)
            self._sources = None
            self._is_settled.set()

    def write(self, file: Path) -> Checksums:
        """Write the shard durably and return its checksums; on the worker.

        Raises:
            SaveFailedError: it would not be what was there at the call.
        """
        snapshot = self._snapshot
        assert snapshot is not None
        if self._same is None:
            snapshot.attach(str(file))
        snapshot.wait_staged()
        self.settle()
        if self._changed:
            raise SaveFailedError(self._why_changed())
        sums: Checksums
        if self._same is None:
            snapshot.finish()
            sums, origin = snapshot.sums(), self.attempt.save_id
        else:
            sums, origin = _link(self._same, file)
            self.attempt.origin = origin
        self.stats |= snapshot.stats()
        self._written = self.path / file.name, sums, origin
        return sums

    def _why_changed(self) -> str:
        names = list(dict.fromkeys(self._changed))
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        return (
            f"saving {self.path}: {', '.join(names[:_MAX_NAMED])}{more} changed between the call and the copy, by something "
            "other than an optimizer's step. Nothing was published; later saves copy what changed before they return. Change "
            "weights in hooks of callbacks or of the module, which wait for the copy, or set "
            "CheckpointSettings(asynchronous=False)."
        )

    def end(self, error: BaseException | None) -> None:
        """Note how it ended and drop what it held."""
        self.error = error
        if self._snapshot is not None:
            self._snapshot.cancel()  # before the lock, whose holder may be waiting for the snapshot
        with self._settling:
            self._sources = self._same = None
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
