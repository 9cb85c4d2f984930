"""Files that appear under their names when they are complete and on the disk, and not before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kenotron.durable import fsync_directory

#: How the name of a file ends that is still being written; it begins with a dot.
UNFINISHED = ".unfinished"


class NewFile:
    """A file that is written under another name until ``publish``.

    Args:
        path: its final name.

    Raises:
        FileExistsError: something stands there.
    """

    def __init__(self, path: Path) -> None:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already. Remove it first, or write to another place.")
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.temporary, "w+b", buffering=1 << 20)  # noqa: SIM115

    @classmethod
    def several(cls, paths: Sequence[Path]) -> list[NewFile]:
        """Begin several files, or none of them."""
        files: list[NewFile] = []
        try:
            for path in paths:
                files.append(cls(path))
        except OSError:
            for file in files:
                file.remove()
            raise
        return files

    def write(self, data: bytes | np.ndarray) -> None:
        """Append bytes."""
        self.file.write(data if isinstance(data, bytes) else np.ascontiguousarray(data).data)

    def remove(self) -> None:
        """Throw away what was written, if it has not been published."""
        with contextlib.suppress(OSError):  # of flushing what nobody wants any more, onto a full disk perhaps
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def publish(files: Sequence[NewFile]) -> None:
    """Put files of one directory on the disk, and then under their names, in this order.

    A crash on the way leaves all that have their names complete. Who reads them begins with the last one.
    """
    for file in files:
        file.file.flush()
        os.fsync(file.file.fileno())
        file.file.close()
    for file in files:
        os.rename(file.temporary, file.path)
    fsync_directory(files[0].path.parent)


def publish_text(path: Path, text: str) -> None:
    """Write a small file, or write it anew, so that it is seen as it was or as it will be, and nothing in between."""
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fsync_directory(path.parent)
