"""Numbers in a file, mapped into memory when they are first read: nothing is held of what nobody reads."""

from __future__ import annotations

import bisect
import os
from pathlib import Path

import numpy as np

from kenotron.data.errors import CorpusSizeError
from kenotron.files import check_regular


class MappedArray:
    """A one-dimensional array in a file.

    It is pickled as its place, so that a worker maps the file anew. Safe to read from several threads. A file that is cut
    short while it is mapped kills the process that reads it (SIGBUS), as with any memory map.

    Args:
        path: the file. dtype: of an element, little-endian. count: elements. offset: byte of the first one, aligned or not.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int, offset: int = 0) -> None:
        self.path, self.dtype, self.count, self.offset = path, dtype, count, offset
        self._num_bytes = offset + count * dtype.itemsize
        self._array: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_array": None}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return elements ``[start, stop)``, an int64 copy.

        Raises:
            IndexError: they are not all there.
            CorpusSizeError: the file is shorter than when it was opened.
        """
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"[{start}, {stop}) of {self.path}, which has {self.count} elements")
        return self._mapped()[start:stop].astype(np.int64)

    def load(self, start: int, stop: int) -> np.ndarray:
        """Return elements ``[start, stop)``, an int64 copy, read without mapping: where each is looked at once.

        Raises:
            CorpusSizeError: the file ends before them.
        """
        begin = self.offset + start * self.dtype.itemsize
        check_regular(self.path)
        read = np.fromfile(self.path, self.dtype, stop - start, offset=begin)
        if len(read) < stop - start:
            end = begin + len(read) * self.dtype.itemsize
            raise CorpusSizeError(self.path, f"ends here, and had at least {self._num_bytes} bytes when it was opened", end)
        return read.astype(np.int64)

    def search(self, value: int, first: int = 0) -> int:
        """Return how many of the elements from ``first`` on, which are sorted, are ``value`` or less."""
        # Not np.searchsorted, which copies an array that is not aligned, as those of an .idx are, as a whole.
        return bisect.bisect_right(self._mapped(), value, lo=first) - first

    def _mapped(self) -> np.ndarray:
        if self._array is None:
            check_regular(self.path)
            size = os.path.getsize(self.path)
            if size < self._num_bytes:
                problem = f"ends here, and had at least {self._num_bytes} bytes when it was opened"
                raise CorpusSizeError(self.path, problem, size)
            if self.count == 0:  # nothing can't be mapped
                self._array = np.zeros(0, self.dtype)
            else:
                mapped = np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(self.count,))
                self._array = mapped.view(np.ndarray)  # slicing a memmap costs several times as much
        return self._array
