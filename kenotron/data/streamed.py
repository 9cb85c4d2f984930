"""Samples of a stream that can only be read from its begin on: packed in its order as they come.

A *cursor* says where a sample begins: pass over the stream, document in it, token in that. Every sample begins at a cursor and
follows from what comes after it, so that a stream can be cut anywhere and gone on with. To get to a document again, the
stream's own state is taken every 64 documents, if it has one (``state_dict`` and ``load_state_dict``, as
``datasets.IterableDataset`` does), and the few documents since are read once more; otherwise all before it are.

All data-parallel ranks read the whole stream, and each keeps its own samples of every batch: nothing is lost or repeated on any
number of them, and what each reads is tokenised by each.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from kenotron.data.made import Refused
from kenotron.data.records import has_shuffle_buffer
from kenotron.data.rows import Rows
from kenotron.data.stream import Sampling

_log = logging.getLogger(__name__)

_DOCUMENTS_PER_STATE = 64
_ENCODED_AT_ONCE = 32  # documents: a stream may be slow, and nobody should wait for more of them than needed


@runtime_checkable
class Stateful(Protocol):
    """An iterable that can go on where it was."""

    def state_dict(self) -> Any:
        """Return where the iteration is."""
        ...

    def load_state_dict(self, state_dict: Any) -> None:
        """Let the next iteration begin there."""
        ...


@runtime_checkable
class _HasEpochs(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Cursor:
    """Where a sample begins.

    Args:
        epoch: passes before. document: documents before, in this pass, those refused included. offset: tokens before, in it.
        state: of the stream, ``None``: none. state_at: at which document.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0
    state: Any = None
    state_at: int = 0


class Document(NamedTuple):
    """A document that was read: where it begins, and its tokens."""

    begin: Cursor
    ids: np.ndarray


#: Makes tokens of rows: token ids, or what is wrong, of each.
Encode = Callable[[list[Any]], list[Any]]


class DocumentStream:
    """The documents of a stream from a cursor on, pass after pass.

    Args:
        rows: the stream. encode: makes token ids (or ``Refused``) of rows.
        shortest: what has fewer tokens is left out.
        repeat: begin again at its end.
        skip: what is refused is counted, and otherwise an error.

    Attributes:
        refused: how many rows were no documents, by kind.

    Raises:
        ValueError: while iterating: a row is no document, or a pass has none at all.
    """

    def __init__(self, rows: Iterable[Any], encode: Encode, *, shortest: int = 1, repeat: bool, skip: bool) -> None:
        self._rows, self._encode, self._shortest, self._repeat, self._skip = rows, encode, shortest, repeat, skip
        self.refused: dict[str, int] = {}
        self._begin: Any = None
        self._has_loaded = False
        self._takes_states = isinstance(rows, Stateful)
        if isinstance(rows, Stateful):
            self._begin = rows.state_dict()
            if has_shuffle_buffer(rows):
                self._takes_states = False
                _log.warning("the stream shuffles in a buffer that its state leaves out: it is resumed by skipping documents.")

    def read(self, cursor: Cursor) -> Iterator[Document]:
        """Yield documents from the one that holds ``cursor`` on; of that one, what comes after it."""
        epoch, first, offset = cursor.epoch, cursor, cursor.offset
        while True:
            num_documents = 0
            for document in self._pass(epoch, first):
                if offset and document.begin.document == cursor.document:
                    begin = Cursor(epoch, cursor.document, offset, document.begin.state, document.begin.state_at)
                    document = Document(begin, document.ids[offset:])
                offset = 0
                num_documents += 1
                yield document
            if not self._repeat:
                return
            if not num_documents and not first.document:
                again = "" if epoch == 0 else ", as it can be read once: give an iterable, not an iterator, or repeat=False"
                told = f"of {self._shortest} tokens or more" if self._shortest > 1 else "with a token"
                raise ValueError(f"Pass {epoch} over the stream has no document {told}{again}.")
            epoch, first = epoch + 1, Cursor(epoch + 1)

    def _pass(self, epoch: int, first: Cursor) -> Iterator[Document]:
        """Yield the documents of a pass."""
        rows, number = self._open(epoch, first)
        state, state_at = (first.state, first.state_at) if self._takes_states else (None, 0)
        has_ended = False
        while not has_ended:
            batch: list[Any] = []
            while len(batch) < _ENCODED_AT_ONCE:
                if self._takes_states and (number + len(batch)) % _DOCUMENTS_PER_STATE == 0 and number + len(batch) > 0:
                    if batch:
                        break  # the state is that before a row is read
                    assert isinstance(self._rows, Stateful)
                    state, state_at = self._rows.state_dict(), number
                row = next(rows, _END)
                has_ended = row is _END
                if has_ended:
                    break
                batch.append(row)
            for place, ids in enumerate(self._encode(batch), number):
                if isinstance(ids, Refused):
                    self._refuse(ids, epoch, place)
                elif len(ids) >= self._shortest:
                    yield Document(Cursor(epoch, place, 0, state, state_at), np.asarray(ids, dtype=np.int64))
            number += len(batch)

    def _open(self, epoch: int, first: Cursor) -> tuple[Iterator[Any], int]:
        """Return the rows of a pass from some document on, at or before the first one that is wanted, and which that is."""
        if isinstance(self._rows, _HasEpochs):
            self._rows.set_epoch(epoch)
        if self._takes_states and first.state is not None:
            assert isinstance(self._rows, Stateful)
            self._rows.load_state_dict(first.state)
            self._has_loaded = True
            rows, at = iter(self._rows), first.state_at
        else:
            if self._has_loaded:
                assert isinstance(self._rows, Stateful)
                self._rows.load_state_dict(self._begin)
            rows, at = iter(self._rows), 0
        skipped = sum(1 for _ in itertools.islice(rows, first.document - at))
        if skipped < first.document - at:
            raise ValueError(
                f"the stream has ended after {at + skipped} documents, and {first.document} of them were trained. Give the "
                "stream that was."
            )
        return rows, first.document

    def _refuse(self, refused: Refused, epoch: int, number: int) -> None:
        if not self._skip:
            raise ValueError(
                f"document {number} of pass {epoch} over the stream: {refused.kind}: {refused.message}. Repair it, or skip and "
                "count such: on_error='skip'"
            )
        self.refused[refused.kind] = self.refused.get(refused.kind, 0) + 1


_END = object()


class Sample(NamedTuple):
    """A sample: runs of tokens of n + 1 for n positions, each with where documents begin in it; where the next one begins.

    Places in ``begins`` are those of tokens of the run, its first excluded.
    """

    runs: list[tuple[np.ndarray, np.ndarray]]
    following: Cursor

    def put(self, out: Rows, row: int, *, apart: bool) -> None:
        """Write it into a row; ``apart``: documents do not see each other."""
        place = 0
        for tokens, begins in self.runs:
            out.put(row, place, tokens)
            if out.begins is not None:
                out.begins[row, place] = True
                out.begins[row, place + begins] = True
            if apart:
                out.ignore(row, place + begins - 1)
            place += len(tokens) - 1
        out.end(row, place)


def samples_of(stream: DocumentStream, cursor: Cursor, sequence_length: int, sampling: Sampling) -> Iterator[Sample]:
    """Yield samples in the order of the stream, from a cursor on, where one begins.

    Windows overlap by one token, so that every pair of tokens is trained once in a pass, and over the end of one into the next.
    Documents are packed whole, next-fit: one that does not fit begins the next sample; what is longer than a sample is cut into
    whole samples and a rest.
    """
    make = _packed if sampling.samples == "documents" else _windows
    return make(stream.read(cursor), cursor, sequence_length)


def _windows(documents: Iterator[Document], cursor: Cursor, length: int) -> Iterator[Sample]:
    held: deque[Document] = deque()
    num_held = 0
    while True:
        while num_held < length + 1:
            document = next(documents, None)
            if document is None:
                if num_held > 1:
                    yield Sample([_joined(held)], _after(held[-1].begin))
                return
            held.append(document)
            num_held += len(document.ids)
        tokens, begins = _joined(held)
        left = length
        while left >= len(held[0].ids):
            left -= len(held.popleft().ids)
        begin, ids = held[0]
        cursor = Cursor(begin.epoch, begin.document, begin.offset + left, begin.state, begin.state_at)
        held[0] = Document(cursor, ids[left:])
        num_held -= length
        yield Sample([(tokens[: length + 1], begins[begins <= length])], cursor)


def _joined(held: Iterable[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of documents one after the other, and where all but the first begin."""
    ids = [document.ids for document in held]
    return np.concatenate(ids), np.cumsum([len(one) for one in ids])[:-1]


def _packed(documents: Iterator[Document], cursor: Cursor, length: int) -> Iterator[Sample]:
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    place, none, last = 0, np.zeros(0, np.int64), cursor
    for begin, ids in documents:
        if runs and place + len(ids) - 1 > length:
            yield Sample(runs, begin)
            runs, place = [], 0
        start = 0
        while len(ids) - 1 - start >= length:
            here = begin.offset + start + length
            cursor = Cursor(begin.epoch, begin.document, here, begin.state, begin.state_at)
            yield Sample([(ids[start : start + length + 1], none)], cursor)
            start += length
        if len(ids) - start > 1:
            runs.append((ids[start:], none))
            place += len(ids) - 1 - start
        last = begin
    if runs:
        yield Sample(runs, _after(last))


def _after(begin: Cursor) -> Cursor:
    """Return where the document after the one that begins at ``begin`` does."""
    return Cursor(begin.epoch, begin.document + 1, 0, begin.state, begin.state_at)


def cursor_to_state(cursor: Cursor) -> dict[str, Any]:
    """Return a cursor as plain values, if the stream's state is one."""
    return dict(cursor.__dict__)


def cursor_from_state(state: Mapping[str, Any]) -> Cursor:
    """Return the cursor that ``cursor_to_state`` was given."""
    return Cursor(**state)
