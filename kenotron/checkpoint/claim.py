"""Whether another run writes to a folder of checkpoints at this moment."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from kenotron.durable import make_directories


class FolderClaim:
    """Marks a folder as that of a living run: a lock of the directory itself, which leaves nothing behind.

    On file systems without such locks nobody is told anything.

    Args:
        folder: which is made where it is missing, and removed at the end if nothing was saved to it.

    Attributes:
        is_shared: whether another process had claimed it before.
    """

    def __init__(self, folder: Path) -> None:
        self.is_shared = False
        self._descriptor = -1
        self._made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
        with contextlib.suppress(OSError):  # a folder that can't be made is told where something is saved to it
            make_directories(folder)
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.is_shared = True

    def release(self) -> None:
        """Let go of it, also where a forked process still has the descriptor."""
        with contextlib.suppress(OSError):  # something lies in it
            for folder in self._made:
                folder.rmdir()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
