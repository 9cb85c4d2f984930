"""Whole documents packed into sequences, first-fit, without an index of documents in memory.

A document of n + 1 tokens takes n positions: each token but the last, with the one that follows it as its label. What is
longer than a sequence is cut into whole sequences and a rest. Documents are taken in groups of 256 in the corpus' order; the
sequences of a group are the whole ones of its long documents, in order, and then bins, to which rests and short documents
go in order, each to the first bin that has room. So every pair of adjacent tokens of a document is trained once in a pass, and
no pair of two documents.

How a group is packed is computed when a sample of it is wanted, for all groups of a batch together. Only how many sequences
there are before each group is kept: 8 bytes for 256 documents, found by packing all groups once, which takes 0.2
microseconds a document on one core, and can be kept in a file.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kenotron.data.masked import ignore_unlearned
from kenotron.data.permutation import digest
from kenotron.data.rows import Rows
from kenotron.data.source import TokenSource
from kenotron.data.windows import check_sequence_length
from kenotron.files import check_regular

#: Documents in a group, and groups that are counted, or kept packed, at once. The first is part of a run's state.
GROUP = 256
_COUNTED_AT_ONCE, _KEPT = 1024, 64


class _Group(NamedTuple):
    """How one group is packed, by document: where it starts, its whole sequences with all before, its rest and that's bin."""

    starts: np.ndarray
    whole: np.ndarray
    rests: np.ndarray
    bins: np.ndarray


class Packing:
    """A source cut into sequences of whole documents.

    Args:
        source: of tokens. sequence_length: positions in a sequence.
        cache: a folder where the counts of sequences are kept for the next time; ``None``: nowhere.

    Raises:
        ValueError: no document has two tokens, or the sequence length is not positive.
    """

    def __init__(self, source: TokenSource, sequence_length: int, *, cache: str | Path | None = None) -> None:
        check_sequence_length(sequence_length)
        self._source, self._length = source, sequence_length
        self._kept: OrderedDict[int, _Group] = OrderedDict()
        self._before = self._load(Path(cache)) if cache is not None else self._count()
        self.num_samples = int(self._before[-1])
        if not self.num_samples:
            raise ValueError(
                f"the corpus {source.name!r} has no document of two tokens or more: there is nothing to train on. Leave it out."
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def fill(self, out: Rows, rows: np.ndarray, numbers: np.ndarray, phase: int) -> None:
        """Write sequences into rows of a batch; see :class:`~kenotron.data.rows.Samples`. The phase changes nothing."""
        assert out.begins is not None
        groups = np.searchsorted(self._before, numbers, side="right") - 1
        packed = self._pack(np.unique(groups).tolist())
        for row, number, index in zip(rows.tolist(), numbers.tolist(), groups.tolist(), strict=True):
            group, number = packed[index], number - int(self._before[index])
            if number < group.whole[-1]:
                document = int(np.searchsorted(group.whole, number, side="right"))
                piece = number - (int(group.whole[document - 1]) if document else 0)
                start = int(group.starts[document]) + piece * self._length
                out.put(row, 0, self._source.read(start, start + self._length + 1))
                ignore_unlearned(out, row, 0, self._source, start, start + self._length + 1)
                out.begins[row, 0] = True
                continue
            place = 0
            whole = np.diff(group.whole, prepend=0)
            for document in np.flatnonzero(group.bins == number - group.whole[-1]).tolist():
                start, rest = int(group.starts[document] + whole[document] * self._length), int(group.rests[document])
                out.put(row, place, self._source.read(start, start + rest + 1))
                ignore_unlearned(out, row, place, self._source, start, start + rest + 1)
                out.begins[row, place] = True
                place += rest
            out.end(row, place)

    def _pack(self, indices: list[int]) -> dict[int, _Group]:
        """Return how groups are packed."""
        new = [index for index in indices if index not in self._kept]
        if new:
            starts, pairs = np.zeros((len(new), GROUP), np.int64), np.zeros((len(new), GROUP), np.int64)
            for i, index in enumerate(new):
                first, last = index * GROUP, min((index + 1) * GROUP, self._source.num_documents)
                starts[i, : last - first], pairs[i, : last - first] = self._documents(first, last)
            whole, rests = np.divmod(pairs, self._length)
            bins, _ = first_fit(rests, self._length)
            for i, index in enumerate(new):
                self._kept[index] = _Group(starts[i], whole[i].cumsum(), rests[i], bins[i])
        packed = {index: self._kept[index] for index in indices}
        for index in indices:
            self._kept.move_to_end(index)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return packed

    def _documents(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where documents [first, last) start, and how many pairs of tokens each has."""
        ends = self._source.ends(first, last)
        starts = np.empty_like(ends)
        starts[0] = self._source.ends(first - 1, first)[0] if first else 0
        starts[1:] = ends[:-1]
        return starts, np.maximum(ends - starts - 1, 0)

    # ------------------------------------------------------------------------------------------------------- counts

    def _count(self) -> np.ndarray:
        """Return how many sequences there are before each group, and in all: int64 of shape (groups + 1,)."""
        num_documents = self._source.num_documents
        counts = [np.zeros(1, np.int64)]
        for first in range(0, num_documents, GROUP * _COUNTED_AT_ONCE):
            last = min(first + GROUP * _COUNTED_AT_ONCE, num_documents)
            pairs = np.zeros(-(-(last - first) // GROUP) * GROUP, np.int64)
            pairs[: last - first] = self._documents(first, last)[1]
            whole, rests = np.divmod(pairs.reshape(-1, GROUP), self._length)
            counts.append(whole.sum(axis=1) + first_fit(rests, self._length)[1])
        return np.concatenate(counts).cumsum()

    def _load(self, folder: Path) -> np.ndarray:
        """Return the counts from a file of the folder, which is made where there is none that fits."""
        source = self._source
        some = np.linspace(0, max(source.num_documents - 1, 0), 256).astype(np.int64)
        ends = [int(source.ends(n, n + 1)[0]) for n in some.tolist()] if source.num_documents else []
        name = digest("packing 1", source.num_tokens, source.num_documents, self._length, GROUP, *ends).hex()[:32]
        path = folder / f"packing-{name}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or one that is cut off: it is made again
            check_regular(path)
            found: np.ndarray = np.load(path)
            if found.shape == (-(-source.num_documents // GROUP) + 1,) and found.dtype == np.int64:
                return found
        found = self._count()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{path.name}.{os.getpid()}.partial.npy"
        try:
            np.save(partial, found)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return found


def first_fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into bins, each into the first that has room; many lists of items at once.

    Args:
        sizes: int64 of shape (lists, items), each 0 to ``room``; 0: no item.

    Returns:
        The bin of each item (int64, as ``sizes``; -1 for no item), and how many bins each list takes (int64, (lists,)).
    """
    lists, items = sizes.shape
    free = np.full((lists, items + 1), room, dtype=np.int64)
    bins = np.full(sizes.shape, -1, dtype=np.int64)
    used, every = np.zeros(lists, np.int64), np.arange(lists)
    for item in np.flatnonzero(sizes.any(axis=0)).tolist():
        size = sizes[:, item]
        chosen = (free[:, : int(used.max(initial=0)) + 1] >= size[:, None]).argmax(axis=1)
        free[every, chosen] -= size
        is_item = size > 0
        bins[is_item, item] = chosen[is_item]
        used = np.where(is_item, np.maximum(used, chosen + 1), used)
    return bins, used
