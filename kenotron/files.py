"""Files that others may have made: only regular ones are opened, and places on this machine are told from URLs.

A FIFO without a writer holds ``open`` for ever, some devices are changed by it, and a directory or a socket in the place of a
file is an error that names no cause.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

#: What opening a socket, or a device without a driver, answers.
_NO_FILE = (errno.ENXIO, errno.ENODEV)


class NotAFileError(OSError):
    """What stands at a path is no regular file."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes, unbuffered by nothing but Python; never waits for a writer.

    Raises:
        NotAFileError: it is a directory, FIFO, device or socket. OSError: as of ``open``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise NotAFileError(errno.EINVAL, _PROBLEM, os.fspath(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(errno.EINVAL, _PROBLEM, os.fspath(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], limit: int = -1) -> bytes:
    """Return the bytes of a regular file, the first ``limit`` or all. Raises as ``open_regular``."""
    with open_regular(path) as file:
        # No more memory than the file takes: a limit is reserved before anything is read.
        size = os.fstat(file.fileno()).st_size
        return file.read(limit if limit < 0 else min(limit, size))


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise ``NotAFileError`` where something else than a regular file stands at ``path``: before a library opens it."""
    open_regular(path).close()


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ``NotAFileError`` where anything in a folder is neither a file nor a folder: before a library looks into it."""
    for entry in os.scandir(folder):
        if os.path.exists(entry.path) and not entry.is_file() and not entry.is_dir():
            raise NotAFileError(errno.EINVAL, _PROBLEM, entry.path)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Tell whether a text names a place as ``s3://bucket/folder`` does, which ``pathlib`` takes for the folder ``s3:``."""
    scheme, separator, _ = os.fspath(path).partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").replace(".", "").isalnum()


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """Return a place on this machine's file systems.

    Raises:
        ValueError: it is a URL. ``what`` names it in the text.
    """
    if is_url(path):
        raise ValueError(
            f"{what} {os.fspath(path)!r} is a URL, and must be a path on this machine. Mount it, or copy it first."
        )
    return Path(path)


_PROBLEM = "is no regular file"
