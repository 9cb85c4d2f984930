"""How the bytes of a shard reach the disk: the one interface that an asynchronous engine replaces."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint.format import CHUNK_BYTES
from kenotron.durable import reserve


class ShardWriter(Protocol):
    """Writes one new file."""

    def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], *, num_bytes: int) -> list[list[int]]:
        """Create ``path`` from a header and what follows it.

        Args:
            path: a file that does not exist.
            header: the first bytes.
            buffers: the rest, in order; each is taken, and freed, before the next one is asked for.
            num_bytes: the size of the whole file.

        Returns:
            For each buffer the CRC-32C of each of its chunks of ``CHUNK_BYTES``.

        Raises:
            OSError: the file exists, there is no room for it, or the device failed.
        """
        ...


class SyncShardWriter:
    """Writes in the calling thread and returns when the file is durable (its name is not yet)."""

    def write(self, path: Path, header: bytes, buffers: Iterable[memoryview], *, num_bytes: int) -> list[list[int]]:
        """Create ``path``; see ``ShardWriter.write``."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve(descriptor, num_bytes, path)
            _write_all(descriptor, memoryview(header), path)
            checksums = [_write_chunks(descriptor, buffer, path) for buffer in buffers]
            assert os.lseek(descriptor, 0, os.SEEK_CUR) == num_bytes, "the layout and the buffers disagree"
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return checksums


def _write_chunks(descriptor: int, buffer: memoryview, path: Path) -> list[int]:
    checksums = []
    for start in range(0, len(buffer), CHUNK_BYTES):
        chunk = buffer[start : start + CHUNK_BYTES]
        checksums.append(crc32c(chunk))
        _write_all(descriptor, chunk, path)
    return checksums


def _write_all(descriptor: int, data: memoryview, path: Path) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
