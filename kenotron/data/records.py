"""Rows of data as mappings from column to value: of JSON lines and Parquet, of ``datasets``, or of any sequence."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from kenotron.data.made import Refused
from kenotron.data.tokenize.documents import PieceReader, Problem, lines_before
from kenotron.data.tokenize.inputs import Piece, cut, digest_of, find_inputs, shard_bytes_of
from kenotron.data.tokenize.shards import place_of

_ROWS_AT_ONCE = 8192  # of a sequence, in one shard


class Record(NamedTuple):
    """A row, and where it is, for people."""

    place: str
    row: Mapping[str, Any]


class Records(Protocol):
    """Rows in shards."""

    def digest(self) -> str:
        """Return what changes when any row does."""
        ...

    def num_shards(self) -> int:
        """Return into how many shards they are cut."""
        ...

    def read(self, shard: int) -> Iterator[Record | Refused]:
        """Yield the rows of a shard, in order."""
        ...


def records_of(given: Any, fingerprint: str | None = None) -> Records:
    """Return what was given as rows.

    Args:
        given: a path, or a list of paths, of JSON lines or Parquet (files, folders, globs, URLs); a map-style dataset of
            ``datasets``; or a sequence of mappings.
        fingerprint: of a dataset or sequence, in the place of what it says or of a digest of all rows.

    Raises:
        ValueError: something else.
    """
    if isinstance(given, (str, os.PathLike)):
        return FileRecords([os.fspath(given)])
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, (str, os.PathLike)) for one in given):
        return FileRecords([os.fspath(one) for one in given])
    if is_mapped_dataset(given) or (isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray))):
        return SequenceRecords(given, fingerprint)
    if "datasets" in sys.modules and isinstance(given, sys.modules["datasets"].DatasetDict):
        raise ValueError(
            f"This is a dictionary of datasets with the splits {', '.join(given)}. Give one of them: data['train']."
        )
    raise ValueError(
        f"A {type(given).__name__} can't be read row by row in any order. Give a path, a datasets.Dataset or a list of "
        "mappings; iterables that are read once are for kenotron.StreamData."
    )


def is_mapped_dataset(given: Any) -> bool:
    """Return whether something is a ``datasets.Dataset``, without importing that package."""
    return "datasets" in sys.modules and isinstance(given, sys.modules["datasets"].Dataset)


def has_shuffle_buffer(given: Any) -> bool:
    """Return whether a stream of ``datasets`` shuffles in a buffer, which its state leaves out."""
    if "datasets" not in sys.modules or not isinstance(given, sys.modules["datasets"].IterableDataset):
        return False
    # What it is made of stands in private names; a test holds them.
    made_of = [given._ex_iterable]
    while made_of:
        part = made_of.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        inside = vars(part)
        made_of += [inside["ex_iterable"]] if "ex_iterable" in inside else inside.get("ex_iterables", [])
    return False


class SequenceRecords:
    """The rows of a ``datasets.Dataset`` or of a sequence of mappings."""

    def __init__(self, rows: Any, fingerprint: str | None) -> None:
        self._rows, self._fingerprint = rows, fingerprint

    def __repr__(self) -> str:
        return f"a {type(self._rows).__name__} of {len(self._rows)} rows"

    @functools.cache  # noqa: B019 - as long-lived as the corpus that holds it
    def digest(self) -> str:
        """Return the fingerprint that was given, that of the dataset, or a digest of all rows."""
        if self._fingerprint is not None:
            return self._fingerprint
        if is_mapped_dataset(self._rows):
            # Named in the documentation of `datasets`, although it looks private; a test holds it.
            return f"datasets {self._rows._fingerprint} {len(self._rows)}"
        digest = hashlib.sha256()
        for number in range(len(self._rows)):
            try:
                text = json.dumps(self._rows[number], sort_keys=True, default=_plain)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"row {number} holds more than text, numbers and lists ({error}). Set fingerprint=..."
                ) from None
            digest.update(text.encode() + b"\n")
        return digest.hexdigest()

    def num_shards(self) -> int:
        """Return how many times 8192 rows there are."""
        return -(-len(self._rows) // _ROWS_AT_ONCE)

    def read(self, shard: int) -> Iterator[Record | Refused]:
        """Yield the rows of a shard."""
        first = shard * _ROWS_AT_ONCE
        numbers = range(first, min(first + _ROWS_AT_ONCE, len(self._rows)))
        rows = self._rows.select(numbers) if is_mapped_dataset(self._rows) else map(self._rows.__getitem__, numbers)
        for number, row in zip(numbers, rows, strict=True):
            if isinstance(row, Mapping):
                yield Record(f"row {number}", row)
            else:
                yield Refused("not a mapping", f"row {number}", type(row).__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


class FileRecords:
    """The rows of files of JSON lines and of Parquet."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __repr__(self) -> str:
        return ", ".join(self._paths[:3]) + (", …" if len(self._paths) > 3 else "")

    @functools.cached_property
    def _pieces(self) -> tuple[str, list[list[Piece]]]:
        """The digest of all files, and their pieces by shard."""
        files = find_inputs([*self._paths], Path(os.devnull))
        for file in files:
            if file.kind == "text":
                raise ValueError(f"{file.name} is plain text, which has no columns. Name files of JSON lines or Parquet.")
        return digest_of(files), cut(files, shard_bytes_of(files))

    def digest(self) -> str:
        """Return what changes with the names, sizes and dates of the files."""
        return self._pieces[0]

    def num_shards(self) -> int:
        """Return into how many shards the files are cut, by their sizes."""
        return len(self._pieces[1])

    def read(self, shard: int) -> Iterator[Record | Refused]:
        """Yield the rows of a shard."""
        for piece in self._pieces[1][shard]:
            before = lines_before(piece)
            for line, offset, found in _RowReader(piece):
                at = place_of(piece.file.name, piece.file.kind, None if line is None else line + before, offset)
                yield Record(at, found) if isinstance(found, dict) else Refused(found.kind, at, found.message)


class _RowReader(PieceReader):
    """Iterates over (line, offset, row or problem) of a piece."""

    def __init__(self, piece: Piece) -> None:
        super().__init__(piece, column="")

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield (item.line, item.offset, item) if isinstance(item, Problem) else item

    def _object(self, line: bytes, number: int, offset: int) -> Any:
        return number, offset, self._parsed(line, number, offset)

    def _row_groups(self, file: Any, arrow: Any) -> Iterator[Any]:
        from kenotron.data.tokenize.documents import _groups_in

        for group in _groups_in(file.metadata, self.piece):
            for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:  # what calls itself a string need not be UTF-8
                    self.lines += len(batch)
                    yield (
                        self.lines,
                        None,
                        Problem("invalid UTF-8", self.lines, None, f"in the {len(batch)} rows up to here: {error}"),
                    )
                    continue
                for row in rows:
                    self.lines += 1
                    yield self.lines, None, row
