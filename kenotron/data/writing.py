"""What writers of token files have in common: documents go in one by one, and the files appear together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from kenotron.data.publish import NewFile, publish


class DocumentWriter(ABC):
    """Writes token ids, document by document.

    Nothing stands under the final names before ``close``. Used as a context manager, it closes at the end and leaves nothing
    behind after an exception.

    Args:
        paths: the files, in the order in which they get their names; the last one has the tokens. dtype: of a token.

    Attributes:
        path: the file of tokens. num_tokens, num_documents: what was written so far.

    Raises:
        FileExistsError: one of them stands there already.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype) -> None:
        self.path = paths[-1]
        self.num_tokens = self.num_documents = 0
        self._dtype = dtype
        self._files = NewFile.several(paths)

    @abstractmethod
    def _index(self, lengths: np.ndarray) -> None:
        """Note documents of these lengths (int64, in tokens), which come after ``num_tokens``."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is known at the end."""

    def write(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append a document."""
        self.write_documents(tokens, [len(tokens)])

    def write_documents(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: of all of them, one after the other. lengths: of each, in tokens.

        Raises:
            ValueError: an id does not fit, or the lengths don't sum up to the number of tokens.
        """
        ids, counts = as_ids(tokens, self._dtype), np.asarray(lengths, dtype=np.int64)
        if int(counts.sum()) != len(ids):
            raise ValueError(f"lengths sum up to {counts.sum()}, and there are {len(ids)} tokens")
        self._files[-1].write(ids)
        self._index(counts)
        self.num_tokens += len(ids)
        self.num_documents += len(counts)

    def close(self) -> None:
        """Publish the files; calling it again does nothing."""
        if not self._files:
            return
        self._finish()
        publish(self._files)
        self._files = []
        self.abort()

    def abort(self) -> None:
        """Remove what was written and not published."""
        for file in self._files:
            file.remove()
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


def as_ids(tokens: Sequence[int] | np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return token ids as ``dtype``; ``ValueError`` names the first one that does not fit."""
    ids = np.asarray(tokens)
    if ids.dtype == dtype and dtype.kind == "u":
        return ids
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"Token ids are integers, and these are {ids.dtype}.")
    limits = np.iinfo(dtype)
    if ids.size and (int(ids.min()) < max(0, limits.min) or int(ids.max()) > limits.max):
        wrong = next(int(token) for token in ids if not 0 <= int(token) <= limits.max)
        raise ValueError(f"Token id {wrong} does not fit into {dtype.itemsize} bytes (0 to {limits.max}).")
    return ids.astype(dtype)
