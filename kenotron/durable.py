"""What the operating system is asked for so that files survive a crash: reserve, fsync, rename."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: What a system call or a file system answers that does not know the request.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def make_directories(path: Path) -> None:
    """Create ``path`` and its parents where they are missing, so that they survive a crash."""
    if path.is_dir():
        return
    make_directories(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: fsync of a file says nothing about its name."""
    fsync(path, os.O_DIRECTORY)


def fsync(path: Path, flags: int = 0) -> None:
    """Make durable what was written to a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is seen either not at all or complete and on the disk (its name: ``fsync_directory``)."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's content to ``target``, on the disk when this returns (its name: ``fsync_directory``)."""
    shutil.copyfile(source, target)
    fsync(target)


def reserve(descriptor: int, num_bytes: int, path: Path) -> None:
    """Claim the blocks of a file before it is written, where the file system can: a full disk is found here.

    Not ``os.posix_fallocate``: where the file system cannot, glibc writes into every single block instead.

    Raises:
        OSError: there is no room (ENOSPC, EDQUOT) or the file may not be as large (EFBIG).
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:  # not Linux
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, 0, 0, num_bytes) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), str(path))


def put_in_place(new: Path, path: Path, aside: Path) -> Path | None:
    """Rename ``new`` to ``path``; what stood there lives on until the new is in place.

    Args:
        new: a complete, durable file or directory.
        path: its final name, in the same directory.
        aside: where the old goes when the two cannot be exchanged in one step. A crash between the two renames that are
            needed then leaves no ``path``, the old as ``aside`` and the new as ``new``, both complete.

    Returns:
        Where the old one is now, None where there was none.
    """
    if not os.path.lexists(path):
        os.rename(new, path)
        return None
    if _exchange(new, path):
        return new
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    return aside


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # not Linux, or a C library older than glibc 2.28
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))
