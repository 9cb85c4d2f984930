"""What a tokenised corpus is to everything that samples from it: tokens by position, and where documents end."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TokenSource(Protocol):
    """Documents of tokens, one after the other, read by position.

    Opening one costs the same for any number of tokens: files are mapped into memory, and nothing is held per document.
    Sources are picklable (workers open the files anew) and safe to read from several threads.

    Attributes:
        name: short, for logs and metrics.
        num_tokens: of all documents together.
        num_documents: how many there are.
    """

    name: str
    num_tokens: int
    num_documents: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)``, an int64 copy of shape (stop - start,)."""
        ...

    def ends(self, first: int, last: int) -> np.ndarray:
        """Return where documents ``[first, last)`` end: token positions, exclusive, int64 of shape (last - first,)."""
        ...

    def document_of(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``; empty documents hold none."""
        ...


class ArraySource:
    """A source in memory.

    Args:
        name: short, for logs. documents: one array of token ids each.
    """

    def __init__(self, name: str, documents: list[np.ndarray]) -> None:
        self.name = name
        self._tokens = np.concatenate([np.asarray(d, dtype=np.int64) for d in documents] or [np.zeros(0, np.int64)])
        self._ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        self.num_tokens, self.num_documents = len(self._tokens), len(documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)``."""
        return self._tokens[start:stop].copy()

    def ends(self, first: int, last: int) -> np.ndarray:
        """Return where documents ``[first, last)`` end."""
        return self._ends[first:last]

    def document_of(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``."""
        return int(np.searchsorted(self._ends, position, side="right"))
