"""Corpora of which not every token is to be learned: prompts, or what a filter has marked.

Beside ``x.ds`` a file ``x.ds.loss`` has one byte for each token: 1 where it is learned, 0 where it is only read, as datatrove
writes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kenotron.data.corpus import JoinedSource
from kenotron.data.errors import CorpusFileMissingError, CorpusSizeError
from kenotron.data.mapped import MappedArray
from kenotron.data.nanoset import NanosetSource
from kenotron.data.rows import Rows
from kenotron.data.source import TokenSource


class MaskedSource:
    """A source with a mask. A ``TokenSource``.

    Args:
        source: the tokens. mask: as many numbers, read by position: 0 where a token is not learned.
    """

    def __init__(self, source: TokenSource, mask: TokenSource) -> None:
        if source.num_tokens != mask.num_tokens:
            raise ValueError(f"{source.name} has {source.num_tokens} tokens, and its mask is for {mask.num_tokens}.")
        self.source, self._mask = source, mask
        self.name, self.num_tokens, self.num_documents = source.name, source.num_tokens, source.num_documents

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)``, an int64 copy of shape (stop - start,)."""
        return self.source.read(start, stop)

    def ends(self, first: int, last: int) -> np.ndarray:
        """Return where documents ``[first, last)`` end: token positions, exclusive, int64 of shape (last - first,)."""
        return self.source.ends(first, last)

    def document_of(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``."""
        return self.source.document_of(position)

    def learned(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens ``[start, stop)`` are learned, bool of shape (stop - start,)."""
        return self._mask.read(start, stop) != 0


def ignore_unlearned(out: Rows, row: int, place: int, source: TokenSource, start: int, stop: int) -> None:
    """Take labels from a row where the tokens [start, stop), put at ``place``, are not learned."""
    if isinstance(source, MaskedSource):
        out.ignore(row, place + np.flatnonzero(~source.learned(start + 1, stop)))


def with_mask(source: TokenSource) -> TokenSource:
    """Return a source of files with the mask that lies beside them, or as it is where there is none.

    Raises:
        CorpusError: a mask is missing beside one of several files, or is not as long as the tokens.
    """
    parts = source.parts if isinstance(source, JoinedSource) else (source,)
    files = [Path(f"{part.path}.loss") for part in parts if isinstance(part, NanosetSource)]
    found = [file for file in files if file.is_file()]
    if not found:
        return source
    missing = [file for file in files if file not in found]
    if missing or len(files) < len(parts):
        lacking = missing[0] if missing else f"{source.name}.loss"
        raise CorpusFileMissingError(lacking, f"is not there, and {found[0]} is: all files of a corpus have masks, or none")
    masks = [_Mask(file, part.num_tokens) for file, part in zip(files, parts, strict=True)]
    return MaskedSource(source, masks[0] if len(masks) == 1 else JoinedSource(f"{source.name}.loss", masks))


class _Mask:
    """A file of one byte for each token, as a source of so many numbers in one document."""

    def __init__(self, path: Path, num_tokens: int) -> None:
        size = path.stat().st_size
        if size != num_tokens:
            problem = f"has {size} bytes, one for each token, and there are {num_tokens} tokens"
            raise CorpusSizeError(path, problem, min(size, num_tokens))
        self.name, self.num_tokens, self.num_documents = path.name, num_tokens, min(num_tokens, 1)
        self._bytes = MappedArray(path, np.dtype("u1"), num_tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._bytes.read(start, stop)

    def ends(self, first: int, last: int) -> np.ndarray:
        return np.full(self.num_documents, self.num_tokens, np.int64)[first:last]

    def document_of(self, position: int) -> int:
        return 0
