"""Windows of a corpus: every adjacent pair of tokens is trained once in a pass.

A corpus of T tokens has T - 1 pairs (a token and the one that follows it), and a sample of sequence length S takes S of them:
it reads S + 1 tokens, the last of which is the first of the next window. With a phase p the first window ends after p pairs;
the corpus is a ring then, of which one window may hold the last pairs and the first ones:

    pairs   0 … p-1 | p … p+S-1 | p+S … | … T-2        window 0 = [T-2's rest] + [0 … p-1], if both fit; else two windows

so that a pass has ⌈(T-1) / S⌉ samples at any phase. What is left of a shorter window is padding without labels.
"""

from __future__ import annotations

import numpy as np

from kenotron.data.masked import ignore_unlearned
from kenotron.data.rows import Rows
from kenotron.data.source import TokenSource

_ENDS_AT_ONCE = 256  # of documents looked up at a time


class Windows:
    """A source cut into windows.

    Args:
        source: of tokens. sequence_length: pairs in a window.
        mask_documents: keep documents apart within a window: positions begin anew (in ``Rows.begins``) and no pair of tokens of
            two documents is trained.

    Raises:
        ValueError: the source has fewer than two tokens, or the sequence length is not positive.
    """

    def __init__(self, source: TokenSource, sequence_length: int, *, mask_documents: bool = False) -> None:
        check_sequence_length(sequence_length)
        if source.num_tokens < 2:
            raise ValueError(
                f"the corpus {source.name!r} has {source.num_tokens} tokens: there is nothing to train on. Leave it out."
            )
        self._source, self._length, self._mask = source, sequence_length, mask_documents
        self._num_pairs = source.num_tokens - 1
        self.num_samples = -(-self._num_pairs // sequence_length)

    def fill(self, out: Rows, rows: np.ndarray, numbers: np.ndarray, phase: int) -> None:
        """Write windows into rows of a batch; see :class:`~kenotron.data.rows.Samples`."""
        phase %= self._length
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            place = 0
            for start, stop in self._pieces(number, phase):
                tokens = self._source.read(start, stop + 1)
                out.put(row, place, tokens)
                ignore_unlearned(out, row, place, self._source, start, stop + 1)
                if out.begins is not None:
                    self._mark(out, row, place, start, stop)
                place += stop - start
            out.end(row, place)

    def _pieces(self, number: int, phase: int) -> list[tuple[int, int]]:
        """Return which pairs a window has: one run, or the corpus' last ones and its first ones."""
        if phase == 0:
            return [(number * self._length, min((number + 1) * self._length, self._num_pairs))]
        first = min(phase, self._num_pairs)
        num_whole, rest = divmod(self._num_pairs - first, self._length)
        last = self._num_pairs - rest, self._num_pairs
        fits = first + rest <= self._length
        if number == 0:
            return [last, (0, first)] if rest and fits else [(0, first)]
        if number <= num_whole:
            start = first + (number - 1) * self._length
            return [(start, start + self._length)]
        assert rest and not fits
        return [last]

    def _mark(self, out: Rows, row: int, place: int, start: int, stop: int) -> None:
        """Mark where documents begin among the tokens [start, stop]. Kept apart, the last token of each has no label."""
        assert out.begins is not None
        out.begins[row, place] = True
        begins = document_begins(self._source, start + 1, stop + 1) - start
        if self._mask:
            out.ignore(row, place + begins - 1)
        out.begins[row, place + begins] = True


def check_sequence_length(sequence_length: int) -> None:
    """Raise ``ValueError`` for a length that is no length."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length}: set it to 1 or more.")


def document_begins(source: TokenSource, start: int, stop: int) -> np.ndarray:
    """Return at which of the positions [start, stop) a document begins, except the corpus' first; int64, ascending."""
    first, found = source.document_of(start - 1), []
    while first < source.num_documents:
        ends = source.ends(first, min(first + _ENDS_AT_ONCE, source.num_documents))
        found.append(ends[(ends >= start) & (ends < stop)])
        if ends[-1] >= stop:
            break
        first += len(ends)
    # Documents without tokens end where the one before them does.
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
