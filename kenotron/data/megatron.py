"""Megatron's indexed files.

- ``x.bin``: token ids, little-endian, one sequence after the other. No header.
- ``x.idx``: ``MMIDIDX\\0\\0``, uint64 version 1, uint8 code of the tokens' type, uint64 number of sequences, uint64 number of
  entries of the last array; then int32 length of each sequence in tokens, int64 byte at which each begins in the ``.bin``, and
  int64 number of sequences before each document, with the number of all of them at the end. Little-endian, nothing aligned.

A document is one sequence, or several.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kenotron.data.errors import CorpusFileMissingError, CorpusHeaderError, CorpusIndexError, CorpusSizeError
from kenotron.data.mapped import MappedArray
from kenotron.data.publish import NewFile
from kenotron.data.writing import DocumentWriter
from kenotron.files import open_regular

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_CODES = {np.dtype(name): code for code, name in _INTEGERS.items()}
#: A length is an int32: what is longer becomes several sequences of one document.
_LONGEST = 2**31 - 1


# ---- Reading --------------------------------------------------------------------------------------------------------


class MegatronSource:
    """The documents of one pair of files. A ``TokenSource``.

    Opening reads the header and four numbers of the index, whatever the size; ``kenotron.data.corpus.check`` reads the rest.

    Args:
        path: the ``.bin``, the ``.idx``, or what both names begin with. name: for logs; None takes the file's.

    Attributes:
        tokens: the ids.

    Raises:
        CorpusError: the files are not whole, or do not belong together.
    """

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        prefix = Path(path)
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        self.path, self.index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for file, other in ((self.path, self.index), (self.index, self.path)):
            if not file.is_file():
                raise CorpusFileMissingError(file, f"is not there, and {other.name} can't be read without it")
        self.name = name or prefix.name
        dtype, self.num_sequences, num_entries = _read_header(self.index)
        size = self.path.stat().st_size
        if size % dtype.itemsize:
            cut = size - size % dtype.itemsize
            raise CorpusSizeError(self.path, f"ends in the middle of a token of {dtype.itemsize} bytes", cut)
        self.num_tokens, self.num_documents = size // dtype.itemsize, num_entries - 1
        self.tokens = MappedArray(self.path, dtype, self.num_tokens)
        lengths = _HEADER.size
        begins = lengths + 4 * self.num_sequences
        documents = begins + 8 * self.num_sequences
        self._lengths = MappedArray(self.index, np.dtype("<i4"), self.num_sequences, lengths)
        self._begins = MappedArray(self.index, np.dtype("<i8"), self.num_sequences, begins)
        self._documents = MappedArray(self.index, np.dtype("<i8"), num_entries, documents)
        self._check_outermost(size)

    def _check_outermost(self, size: int) -> None:
        """Check the first and the last entry of each array."""
        (first,) = self._documents.load(0, 1)
        if first != 0:
            raise CorpusIndexError(self.index, f"the first document begins at sequence {first}, not 0", self._documents.offset)
        (last,) = self._documents.load(self.num_documents, self.num_documents + 1)
        place = self._documents.offset + 8 * self.num_documents
        if last != self.num_sequences:
            raise CorpusIndexError(self.index, f"the last document ends at sequence {last} of {self.num_sequences}", place)
        end, count = 0, self.num_sequences
        if count:
            (first,), (begin,) = self._begins.load(0, 1), self._begins.load(count - 1, count)
            (length,) = self._lengths.load(count - 1, count)
            if first != 0:
                problem = f"the first sequence begins at byte {first} of {self.path.name}, not 0"
                raise CorpusIndexError(self.index, problem, self._begins.offset)
            end = int(begin) + int(length) * self.tokens.dtype.itemsize
        if end != size:
            raise CorpusSizeError(
                self.path,
                f"has {size} bytes, and by {self.index.name} its last sequence ends at byte {end}. One of the two files is cut "
                "off, or they don't belong together",
                min(size, max(end, 0)),
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)``, an int64 copy of shape (stop - start,)."""
        return self.tokens.read(start, stop)

    def ends(self, first: int, last: int) -> np.ndarray:
        """Return where documents ``[first, last)`` end: token positions, exclusive, int64 of shape (last - first,).

        Raises:
            CorpusIndexError: one of them ends where there is no sequence.
        """
        if not 0 <= first <= last <= self.num_documents:
            raise IndexError(f"documents [{first}, {last}) of {self.path}, which has {self.num_documents}")
        sequences = self._documents.read(first + 1, last + 1)  # which begin where the documents end
        wrong = np.flatnonzero((sequences < sequences[:1]) | (sequences < 0) | (sequences > self.num_sequences))
        if wrong.size:  # a look at what is needed here; `check_ends` looks at all
            at = int(wrong[0])
            problem = f"document {first + at} ends at sequence {sequences[at]} of {self.num_sequences}"
            raise CorpusIndexError(self.index, problem, self._documents.offset + 8 * (first + at + 1))
        low = int(sequences[0]) if len(sequences) else 0
        high = min(int(sequences[-1]) + 1 if len(sequences) else 0, self.num_sequences)
        inner = self._begins.read(min(low, high), high) // self.tokens.dtype.itemsize
        return np.concatenate((inner, [self.num_tokens]))[sequences - low] if len(sequences) else np.zeros(0, np.int64)

    def document_of(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``; empty documents hold none."""
        sequence = self._begins.search(position * self.tokens.dtype.itemsize) - 1
        return self._documents.search(sequence) - 1

    def check_ends(self, first: int, last: int, begin: int) -> int:
        """Check documents ``[first, last)`` and their sequences, and return where the last of them ends.

        Args:
            begin: where document ``first`` begins, in tokens.

        Raises:
            CorpusIndexError: a document ends before it begins; a sequence does not begin where the one before ends.
        """
        documents = self._documents.load(first, last + 1)
        wrong = np.flatnonzero((documents[1:] < documents[:-1]) | (documents[1:] > self.num_sequences))
        if wrong.size:
            at = int(wrong[0])
            problem = f"document {first + at} is sequences {documents[at]} to {documents[at + 1]} of {self.num_sequences}"
            raise CorpusIndexError(self.index, problem, self._documents.offset + 8 * (first + at + 1))
        low, high, width = int(documents[0]), int(documents[-1]), self.tokens.dtype.itemsize
        for start in range(low, high, 1 << 20):
            stop = min(start + (1 << 20), high)
            lengths, begins = self._lengths.load(start, stop), self._begins.load(start, stop)
            if (lengths < 0).any():
                at = int(np.flatnonzero(lengths < 0)[0])
                problem = f"sequence {start + at} has {lengths[at]} tokens"
                raise CorpusIndexError(self.index, problem, self._lengths.offset + 4 * (start + at))
            expected = begin * width + np.concatenate(([0], np.cumsum(lengths * width)))
            wrong = np.flatnonzero(begins != expected[:-1])
            if wrong.size:
                at = int(wrong[0])
                problem = f"sequence {start + at} begins at byte {begins[at]}, and the one before ends at {expected[at]}"
                raise CorpusIndexError(self.index, problem, self._begins.offset + 8 * (start + at))
            begin = int(expected[-1]) // width
        return begin


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    """Return the tokens' type, the number of sequences, and the number of entries that tell of documents."""
    size = index.stat().st_size
    with open_regular(index) as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)] or not header:
        raise CorpusHeaderError(index, "does not begin with MMIDIDX: it is no index of Megatron's", 0)
    if len(header) < _HEADER.size:
        raise CorpusSizeError(index, f"ends within the header of {_HEADER.size} bytes", len(header))
    _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
    if version != 1:
        raise CorpusHeaderError(index, f"version {version}; this code reads version 1", 9)
    if code in _FLOATS:
        raise CorpusHeaderError(index, f"its values are {_FLOATS[code]} (code {code}), and token ids are integers", 17)
    if code not in _INTEGERS:
        raise CorpusHeaderError(index, f"type code {code}; those of integers are {sorted(_INTEGERS)}", 17)
    needed = _HEADER.size + 12 * num_sequences + 8 * num_entries
    if size != needed:
        problem = f"has {size} bytes, and {num_sequences} sequences and {num_entries} document entries make {needed}"
        raise CorpusSizeError(index, problem, min(size, needed))
    if num_entries < 1:
        raise CorpusIndexError(index, "no document entry, where the number 0 must be the first", 26)
    return np.dtype(_INTEGERS[code]), num_sequences, num_entries


# ---- Writing --------------------------------------------------------------------------------------------------------


class MegatronWriter(DocumentWriter):
    """Writes a ``.bin`` and its ``.idx``, document by document, one sequence each (more where it has 2^31 tokens).

    Nothing stands under the final names before ``close``: the index and then the tokens are renamed when both are on the disk.
    Used as a context manager, it closes at the end and leaves nothing behind after an exception.

    Args:
        path: the ``.bin`` to make, or what both names begin with. dtype: of the tokens; any integer type of the format.

    Raises:
        FileExistsError: it stands there already.
    """

    def __init__(self, path: str | Path, *, dtype: str | np.dtype) -> None:
        ids = np.dtype(dtype).newbyteorder("<")
        if ids not in _CODES:
            allowed = ", ".join(np.dtype(name).name for name in _INTEGERS.values())
            raise ValueError(f"dtype={ids!s} is none that Megatron's format has for integers. Set it to one of {allowed}.")
        prefix = Path(path)
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        super().__init__([Path(f"{prefix}.idx"), Path(f"{prefix}.bin")], ids)
        self._num_sequences = 0
        # The header of the index counts what comes after it: lengths and documents wait in files of their own.
        self._lengths, self._documents = self._waiting = NewFile.several(
            [Path(f"{prefix}.idx.lengths"), Path(f"{prefix}.idx.documents")]
        )
        self._documents.write(np.zeros(1, "<i8"))

    def _index(self, lengths: np.ndarray) -> None:
        sequences = np.maximum(-(-lengths // _LONGEST), 1)
        if len(lengths) and int(lengths.max()) > _LONGEST:
            of_sequences = np.full(int(sequences.sum()), _LONGEST, "<i4")
            of_sequences[np.cumsum(sequences) - 1] = lengths - (sequences - 1) * _LONGEST
            self._lengths.write(of_sequences)
        else:
            self._lengths.write(lengths.astype("<i4"))
        self._documents.write((self._num_sequences + np.cumsum(sequences)).astype("<i8"))
        self._num_sequences += int(sequences.sum())

    def _finish(self) -> None:
        index, code = self._files[0], _CODES[self._dtype]
        index.write(_HEADER.pack(_MAGIC, 1, code, self._num_sequences, self.num_documents + 1))
        for chunk in _chunks(self._lengths):
            index.write(chunk)
        begin = 0
        for chunk in _chunks(self._lengths):
            sizes = np.frombuffer(chunk, "<i4").astype(np.int64) * self._dtype.itemsize
            ends = begin + np.cumsum(sizes)
            index.write((ends - sizes).astype("<i8"))
            begin = int(ends[-1])
        for chunk in _chunks(self._documents):
            index.write(chunk)

    def abort(self) -> None:
        """Remove what was written and not published."""
        super().abort()
        for file in self._waiting:
            file.remove()
        self._waiting = []


def _chunks(waiting: NewFile) -> Iterator[bytes]:
    """Yield what was written to a file, from its begin."""
    waiting.file.seek(0)
    while chunk := waiting.file.read(1 << 20):
        yield chunk
