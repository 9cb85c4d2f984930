"""Nanoset files, as datatrove writes them and Nanotron reads them.

- ``x.ds``: token ids, little-endian unsigned integers of 2 or 4 bytes, one document after the other. No header.
- ``x.ds.index``: for each document the token position at which it ends (exclusive), uint64 little-endian. No header.
- ``x.ds.metadata``: three lines of text: ``tokenizer|bytes of a token``, the number of tokens, and that number for people.
  Older ones name the tokenizer alone.

An index is needed to tell documents apart, not to read tokens; a ``.ds`` without one is read as one document if its metadata
says how many tokens it has, since otherwise nobody can tell whether it is all there.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kenotron.data.errors import CorpusFileMissingError, CorpusIndexError, CorpusMetadataError, CorpusSizeError
from kenotron.data.mapped import MappedArray
from kenotron.data.writing import DocumentWriter
from kenotron.files import open_regular, read_regular

_ENDS = np.dtype("<u8")
_TOKENS: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_size_of(vocab_size: int) -> int:
    """Return the bytes of a token under a vocabulary: 2 as long as every id fits, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


# ---- Reading --------------------------------------------------------------------------------------------------------


class NanosetSource:
    """The documents of one ``.ds`` file. A ``TokenSource``.

    Opening reads the metadata and the last entry of the index, whatever the size; ``kenotron.data.corpus.check`` reads all.

    Args:
        path: the ``.ds`` file.
        name: for logs; None takes the file's.
        token_size: bytes of a token, where neither metadata nor index tell. Where they do, it must agree.
        vocab_size: of the model. Where nothing else tells, a token has 2 bytes if this is below 65535, else 4: Nanotron's rule.

    Attributes:
        tokens: the ids. tokenizer: what the metadata calls the tokenizer, None without metadata.

    Raises:
        CorpusError: the files are not whole, or do not belong together.
        ValueError: nothing tells how many bytes a token has, or ``token_size`` contradicts the files.
    """

    def __init__(
        self, path: str | Path, *, name: str | None = None, token_size: int | None = None, vocab_size: int | None = None
    ) -> None:
        self.path = Path(path)
        if token_size not in (None, *_TOKENS):
            raise ValueError(f"token_size={token_size!r}: a token of a .ds file has 2 or 4 bytes. Set it to one of them.")
        if not self.path.is_file():
            raise CorpusFileMissingError(self.path, "there is no such file")
        self.name = name or self.path.stem
        size = self.path.stat().st_size
        metadata = _read_metadata(self.path)
        index = self.path.with_name(self.path.name + ".index")
        last_end = None
        if index.is_file():
            self.num_documents, last_end = _read_last_end(index)
        elif metadata is None:
            raise CorpusFileMissingError(index, f"is not there, nor is {self.path}.metadata: was their writing cut off?")
        width = _width(self.path, size, metadata, last_end, token_size, vocab_size)
        if size % width:
            raise CorpusSizeError(self.path, f"ends in the middle of a token of {width} bytes", size - size % width)
        self.num_tokens = size // width
        if last_end is not None and last_end != self.num_tokens:
            raise CorpusSizeError(
                self.path,
                f"{self.num_tokens} tokens of {width} bytes end here, and by {index.name} they are {last_end}. One of the two "
                "files is cut off, or they don't belong together",
                min(size, last_end * width),
            )
        if metadata is not None and metadata.num_tokens != self.num_tokens:
            raise CorpusSizeError(
                self.path,
                f"{self.num_tokens} tokens of {width} bytes end here, and by {self.path.name}.metadata they are "
                f"{metadata.num_tokens}. One of the two files is cut off, or they don't belong together",
                min(size, metadata.num_tokens * width),
            )
        self.tokens = MappedArray(self.path, _TOKENS[width], self.num_tokens)
        self._ends = None if last_end is None else MappedArray(index, _ENDS, self.num_documents)
        self.tokenizer = None if metadata is None else metadata.tokenizer
        if self._ends is None:
            self.num_documents = min(self.num_tokens, 1)
            warnings.warn(f"{self.path} has no .index: all of it is read as one document.", stacklevel=2)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)``, an int64 copy of shape (stop - start,)."""
        return self.tokens.read(start, stop)

    def ends(self, first: int, last: int) -> np.ndarray:
        """Return where documents ``[first, last)`` end: token positions, exclusive, int64 of shape (last - first,)."""
        if self._ends is None:
            return np.full(self.num_documents, self.num_tokens, np.int64)[first:last]
        return self._ends.read(first, last)

    def document_of(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``; empty documents hold none."""
        return 0 if self._ends is None else self._ends.search(position)

    def check_ends(self, first: int, last: int, begin: int) -> int:
        """Check where documents ``[first, last)`` end, and return where the last of them does.

        Args:
            begin: where document ``first`` begins.

        Raises:
            CorpusIndexError: one ends before it begins, or past the last token.
        """
        if self._ends is None:
            return self.num_tokens
        ends = np.concatenate(([begin], self._ends.load(first, last)))
        wrong = np.flatnonzero((ends[1:] < ends[:-1]) | (ends[1:] > self.num_tokens))
        if wrong.size:
            at = int(wrong[0])
            raise CorpusIndexError(
                self._ends.path,
                f"document {first + at} ends at token {int(ends[at + 1]) % 2**64}; it begins at {ends[at]}, and there are "
                f"{self.num_tokens} tokens",
                (first + at) * _ENDS.itemsize,
            )
        return int(ends[-1])


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    tokenizer: str
    token_size: int | None
    num_tokens: int


def _read_metadata(path: Path) -> _Metadata | None:
    metadata = path.with_name(path.name + ".metadata")
    if not metadata.is_file():
        return None
    content = read_regular(metadata, 1 << 20)  # names are short, and this may be any file
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CorpusMetadataError(metadata, "is not UTF-8 text", error.start) from None
    num_tokens = _number(lines[1]) if len(lines) > 1 else None
    if num_tokens is None:
        raise CorpusMetadataError(metadata, "the second line must be the number of tokens", len(lines[0].encode()) + 1)
    tokenizer, bar, width = lines[0].rpartition("|")
    token_size = _number(width) if bar else None
    if token_size is None:
        return _Metadata(tokenizer=lines[0], token_size=None, num_tokens=num_tokens)
    if token_size not in _TOKENS:
        raise CorpusMetadataError(metadata, f"a token has 2 or 4 bytes, not {token_size}", len(tokenizer.encode()) + 1)
    return _Metadata(tokenizer=tokenizer, token_size=token_size, num_tokens=num_tokens)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[0-9]{1,19}\s*", text) else None


def check_index(path: Path, num_documents: int, record: str) -> None:
    """Check that the index of a ``.ds`` file tells as many documents as ``record`` does: otherwise they would run together.

    Raises:
        CorpusFileMissingError, CorpusSizeError: it is not there, or is shorter or longer.
    """
    index = path.with_name(path.name + ".index")
    told = f"by {record} it is of {num_documents} documents"
    if not index.exists():
        raise CorpusFileMissingError(index, f"is not there, and {told}")
    size, expected = index.stat().st_size, _ENDS.itemsize * num_documents
    if size != expected:
        raise CorpusSizeError(index, f"has {size} bytes, and {told}, {_ENDS.itemsize} bytes each", min(size, expected))


def _read_last_end(index: Path) -> tuple[int, int]:
    """Return the number of documents and where the last of them ends."""
    size = index.stat().st_size
    if size % _ENDS.itemsize:
        cut = size - size % _ENDS.itemsize
        raise CorpusSizeError(index, "ends in the middle of an entry of 8 bytes", cut)
    if size == 0:
        return 0, 0
    with open_regular(index) as file:
        file.seek(-_ENDS.itemsize, os.SEEK_END)
        return size // _ENDS.itemsize, int.from_bytes(file.read(_ENDS.itemsize), "little")


def _width(
    path: Path, size: int, metadata: _Metadata | None, last_end: int | None, token_size: int | None, vocab_size: int | None
) -> int:
    """Return the bytes of a token: as the metadata says, else as the index does, else as the user does."""
    told = None if metadata is None else metadata.token_size
    if told is None and metadata is not None and metadata.num_tokens * 4 == size:
        told = 4
    elif told is None and metadata is not None and metadata.num_tokens * 2 == size:
        told = 2
    elif told is None and last_end:
        told = next((width for width in _TOKENS if last_end * width == size), None)
        if told is None and token_size is None:
            raise CorpusSizeError(
                path,
                f"its {size} bytes are not the {last_end} tokens of its index, neither with 2 bytes for a token nor with 4. "
                "One of the two files is cut off, or they don't belong together",
                min(size, last_end * 4),
            )
    if told is not None and token_size not in (None, told):
        raise ValueError(
            f"token_size={token_size}, and the tokens of {path} have {told} bytes. Leave it out, or set it to {told}."
        )
    if told is None and token_size is None and vocab_size is not None:
        return 2 if vocab_size < 65535 else 4
    if told is None and token_size is None and size == 0:
        return 2
    if told is None and token_size is None:
        raise ValueError(f"Nothing tells how many bytes a token of {path} has. Set token_size to 2 or to 4.")
    return told or token_size or 2


# ---- Writing --------------------------------------------------------------------------------------------------------


class NanosetWriter(DocumentWriter):
    """Writes a ``.ds`` file, its index and its metadata, document by document.

    Nothing stands under the final names before ``close``: the metadata, the index and then the tokens are renamed when all
    are on the disk. Used as a context manager, it closes at the end and leaves nothing behind after an exception.

    Args:
        path: the ``.ds`` file to make. token_size: bytes of a token, 2 or 4. tokenizer: name of it, for the metadata.

    Raises:
        FileExistsError: it stands there already.
    """

    def __init__(self, path: str | Path, *, token_size: int, tokenizer: str = "") -> None:
        path = Path(path)
        if token_size not in _TOKENS:
            raise ValueError(f"token_size={token_size!r}: set it to 2 or to 4.")
        if path.suffix != ".ds":
            raise ValueError(f"{path}: the name of a Nanoset file ends in .ds")
        if "\n" in tokenizer:
            raise ValueError(f"tokenizer={tokenizer!r}: its name must be one line")
        self._tokenizer = tokenizer
        super().__init__([path.with_name(path.name + suffix) for suffix in (".metadata", ".index", "")], _TOKENS[token_size])

    def _index(self, lengths: np.ndarray) -> None:
        self._files[1].write((np.cumsum(lengths) + self.num_tokens).astype(_ENDS))

    def _finish(self) -> None:
        lines = (f"{self._tokenizer}|{self._dtype.itemsize}", str(self.num_tokens), _for_people(self.num_tokens))
        self._files[0].write("\n".join(lines).encode())


def _for_people(count: int) -> str:
    """Return a count as datatrove's metadata has it: three digits, and a power of a thousand of tokens (T)."""
    value, unit = float(count), ""
    for larger in ("k", "M", "G", "T", "P"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}T"
