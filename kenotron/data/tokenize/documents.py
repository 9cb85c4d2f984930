"""From bytes to documents: the texts of a piece of a file, and what is wrong with the others."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kenotron.data.tokenize.inputs import Piece, needed

_BLOCK = 1 << 20
#: Of compressed bytes less at a time: they may become a thousand times as many.
_COMPRESSED_BLOCK = 1 << 16


class Document(NamedTuple):
    """A text. ``line``: of its file, counted from 1 where the piece begins (a row in Parquet). ``offset``: its byte."""

    text: str
    line: int
    offset: int


class Problem(NamedTuple):
    """Something that is no document.

    Attributes:
        kind: "invalid UTF-8", "broken JSON", "missing column", "not a string", "empty", "unreadable" or "not encodable".
        line: of its file, counted from 1 where the piece begins (a row in Parquet); None where it concerns the whole file.
        offset: of the byte (in compressed files: of the text that was compressed), None in Parquet.
        message: what was found, in a few words.
    """

    kind: str
    line: int | None
    offset: int | None
    message: str


class PieceReader:
    """Iterates over the documents and the problems of a piece.

    Args:
        piece: of a file. column: of JSON objects and of Parquet, that holds the text.

    Attributes:
        position: bytes of the piece that have been read. lines: lines, or rows, that have begun in it.

    Raises:
        OSError: while iterating: the file can't be opened or read.
    """

    def __init__(self, piece: Piece, column: str) -> None:
        self.piece, self.column = piece, column
        self.position = self.lines = 0

    def __iter__(self) -> Iterator[Document | Problem]:
        file = self.piece.file
        with file.filesystem.open(file.path, "rb") as opened:
            if file.kind == "jsonl":
                yield from self._jsonl(opened)
            elif file.kind == "parquet":
                yield from self._parquet(opened)
            else:
                yield from self._text(opened)
        self.position = self.piece.stop - self.piece.start

    # ---- Plain text ----

    def _text(self, opened: Any) -> Iterator[Document | Problem]:
        self.lines = 1
        try:
            content = b"".join(self._blocks(opened))
        except _DamagedError as error:
            yield Problem("unreadable", None, None, str(error))
            return
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            yield Problem("invalid UTF-8", line, error.start, f"{error.reason}: 0x{content[error.start]:02x}")
            return
        text = text.removeprefix("\ufeff")
        yield Document(text, 1, 0) if text else Problem("empty", 1, 0, "the file is empty")

    # ---- JSON lines ----

    def _jsonl(self, opened: Any) -> Iterator[Document | Problem]:
        line_number, offset = 0, self.piece.start
        try:
            for offset, line in self._lines(opened):
                self.lines = line_number = line_number + 1
                if line and not line.isspace():
                    yield self._object(line, line_number, offset)
        except _DamagedError as error:
            yield Problem("unreadable", line_number + 1, offset, str(error))

    def _lines(self, opened: Any) -> Iterator[tuple[int, bytes]]:
        """Yield lines that begin in the piece, and their offsets."""
        # A compressed file is one piece, and its offsets count the text within: nothing of it is past the end.
        stop = self.piece.stop if not self.piece.file.compression else 1 << 63
        offset = self.piece.start
        if offset:
            opened.seek(offset - 1)
            skipped = _skip_line(opened, stop - offset + 1)
            if skipped is None:
                return
            offset += skipped - 1
            opened.seek(offset)
        begun: list[bytes] = []  # of a line that goes on in the next block
        for block in self._blocks(opened):
            *whole, last = block.split(b"\n")
            for end in whole:
                if offset >= stop:
                    return
                line = b"".join((*begun, end)) if begun else end
                begun = []
                yield offset, line
                offset += len(line) + 1
            if last:
                begun.append(last)
            if not begun and offset >= stop:
                return
        if begun and offset < stop:
            yield offset, b"".join(begun)

    def _object(self, line: bytes, number: int, offset: int) -> Document | Problem:
        value = self._parsed(line, number, offset)
        if isinstance(value, Problem):
            return value
        if self.column not in value:
            return Problem("missing column", number, offset, _no_column(self.column, list(value)))
        return _text_of(value[self.column], number, offset)

    @staticmethod
    def _parsed(line: bytes, number: int, offset: int) -> dict[str, Any] | Problem:
        """Return the object of a line."""
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = offset + error.start
            return Problem("invalid UTF-8", number, at, f"{error.reason}: 0x{line[error.start]:02x}")
        if offset == 0:
            decoded = decoded.removeprefix("\ufeff")
        try:
            value = json.loads(decoded)
        except (ValueError, RecursionError) as error:  # numbers of too many digits are no JSONDecodeError
            return Problem("broken JSON", number, offset, str(error)[:200])
        if not isinstance(value, dict):
            return Problem("broken JSON", number, offset, f"not an object but {type(value).__name__}")
        return value

    # ---- Parquet ----

    def _parquet(self, opened: Any) -> Iterator[Document | Problem]:
        parquet, arrow = needed("pyarrow.parquet", "Reading Parquet"), needed("pyarrow", "Reading Parquet")
        try:
            file = parquet.ParquetFile(opened)
        except (arrow.ArrowException, OSError) as error:
            if self.piece.start == 0:  # once for a file
                yield _unreadable(error, None)
            return
        try:
            yield from self._row_groups(file, arrow)
        except (arrow.ArrowException, OSError) as error:
            yield _unreadable(error, self.lines + 1)

    def _row_groups(self, file: Any, arrow: Any) -> Iterator[Document | Problem]:
        schema = file.schema_arrow
        if self.column not in schema.names:
            if self.piece.start == 0:
                yield Problem("missing column", None, None, _no_column(self.column, schema.names))
            return
        kind = schema.field(self.column).type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
            if self.piece.start == 0:
                yield Problem("not a string", None, None, f"column {self.column!r} holds {kind}")
            return
        for group in _groups_in(file.metadata, self.piece):
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[self.column]):
                # As bytes: what calls itself a string need not be UTF-8.
                values = batch.column(0).cast(arrow.large_string()).cast(arrow.large_binary()).to_pylist()
                for value in values:
                    self.lines += 1
                    yield self._value(value)
            self.position = min(_begin_of(file.metadata, group) - self.piece.start, self.piece.stop - self.piece.start)

    def _value(self, value: bytes | None) -> Document | Problem:
        if value is None:
            return Problem("not a string", self.lines, None, "null")
        try:
            return _text_of(value.decode("utf-8"), self.lines, None)
        except UnicodeDecodeError as error:
            return Problem("invalid UTF-8", self.lines, None, f"{error.reason}: 0x{value[error.start]:02x}")

    # ---- Bytes ----

    def _blocks(self, opened: Any) -> Iterator[bytes]:
        """Yield the bytes of a file from where it stands, uncompressed."""
        compression = self.piece.file.compression
        if not compression:
            while block := opened.read(_BLOCK):
                yield block
                self.position = min(opened.tell(), self.piece.stop) - self.piece.start
            return
        begin: Callable[[], Any] = lambda: zlib.decompressobj(wbits=31)  # noqa: E731
        damage: type[Exception] = zlib.error
        if compression == "zst":
            zstandard = needed("zstandard", "Reading .zst")
            begin, damage = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError
        # Gzip has members, zstandard has frames: of either there may be several, one after the other.
        part = None
        while packed := opened.read(_COMPRESSED_BLOCK):
            while packed:
                if part is None and compression == "gz" and not packed.strip(b"\0"):
                    packed = b""  # gzip's padding
                    continue
                part = begin() if part is None else part
                try:
                    block = part.decompress(packed)
                except damage as error:
                    raise _DamagedError(f"damaged at about byte {opened.tell() - len(packed)} of it: {error}") from None
                packed = b""
                if part.eof:
                    packed, part = part.unused_data, None
                if block:
                    yield block
            self.position = opened.tell()
        if part is not None:
            raise _DamagedError(f"cut off: its {opened.tell()} bytes end within compressed data")


class _DamagedError(Exception):
    """Compressed data that is none, or ends too early."""


def lines_before(piece: Piece) -> int:
    """Return how many lines, or rows, of its file precede a piece. Reads the file up to there."""
    count = 0
    if piece.start == 0:
        return 0
    with piece.file.filesystem.open(piece.file.path, "rb") as opened:
        if piece.file.kind == "parquet":
            metadata = needed("pyarrow.parquet", "Reading Parquet").ParquetFile(opened).metadata
            groups = [group for group in range(metadata.num_row_groups) if _begin_of(metadata, group) < piece.start]
            return sum(metadata.row_group(group).num_rows for group in groups)
        # The line that goes on into the piece began before it.
        left = piece.start
        block = b"\n"
        while left and (block := opened.read(min(_BLOCK, left))):
            count += block.count(b"\n")
            left -= len(block)
        return count + (not block.endswith(b"\n"))


def _skip_line(opened: Any, limit: int) -> int | None:
    """Return how many bytes the line has left, its end included; None where that is ``limit`` or more."""
    skipped = 0
    while skipped < limit and (block := opened.read(min(_BLOCK, limit - skipped))):
        end = block.find(b"\n")
        if end >= 0:
            return skipped + end + 1
        skipped += len(block)
    return None


def _groups_in(metadata: Any, piece: Piece) -> list[int]:
    return [n for n in range(metadata.num_row_groups) if piece.start <= _begin_of(metadata, n) < piece.stop]


def _begin_of(metadata: Any, group: int) -> int:
    """Return the first byte of a row group."""
    column = metadata.row_group(group).column(0)
    return min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)


def _text_of(value: object, line: int, offset: int | None) -> Document | Problem:
    if not isinstance(value, str):
        return Problem("not a string", line, offset, "null" if value is None else type(value).__name__)
    if not value:
        return Problem("empty", line, offset, "the text is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is JSON, and no text
            return Problem("invalid UTF-8", line, offset, f"a lone surrogate, {value[error.start]!a}")
    return Document(value, line, -1 if offset is None else offset)


def _no_column(column: str, columns: list[str]) -> str:
    listed = ", ".join(map(repr, columns[:8])) + (", …" if len(columns) > 8 else "")
    return f"no {column!r} among {listed or 'no columns at all'}"


def _unreadable(error: Exception, row: int | None) -> Problem:
    """Return what Arrow says of damage; an error of the operating system stays one."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return Problem("unreadable", row, None, (str(error).splitlines() or [type(error).__name__])[0][:200])
