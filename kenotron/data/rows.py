"""A batch of training samples as arrays, and what turns corpora into such samples."""

from __future__ import annotations

from typing import Protocol

import numpy as np

IGNORED = -100  # the label of positions without one, as torch's and transformers' losses know it


class Rows:
    """The rows of a batch, each to be filled: ``put`` runs of tokens, then ``end``.

    Args:
        count: of samples. sequence_length: positions of each. pad_token_id: stands where there is no token.
        mark_documents: keep where documents begin, so that positions begin anew there.
        restart_positions: otherwise documents are only marked.

    Attributes:
        input_ids: int64 of shape (count, sequence_length).
        shift_labels: int64 of that shape: the token that follows each position; -100 where none is to be learned.
        labels: int64 of that shape: the same, one position later, for a model that shifts by itself; -100 at the first.
        begins: bool of shape (count, sequence_length + 1): where a document (or padding) begins, the last label included;
            ``None`` without ``mark_documents``.
        restarts_positions: whether positions begin anew with documents.
    """

    def __init__(
        self, count: int, sequence_length: int, pad_token_id: int, mark_documents: bool, restart_positions: bool = True
    ) -> None:
        # Uninitialised: most rows are full, and writing them twice is half of what a batch costs.
        self.input_ids = np.empty((count, sequence_length), dtype=np.int64)
        self.shift_labels = np.empty((count, sequence_length), dtype=np.int64)
        self.labels = np.empty((count, sequence_length), dtype=np.int64)
        self.labels[:, 0] = IGNORED
        self.begins = np.zeros((count, sequence_length + 1), dtype=bool) if mark_documents else None
        self.restarts_positions = mark_documents and restart_positions
        self._pad_token_id = pad_token_id

    def put(self, row: int, place: int, tokens: np.ndarray) -> None:
        """Write a run of n + 1 tokens into n positions: each token but the last, with the one that follows it."""
        stop = place + len(tokens) - 1
        self.input_ids[row, place:stop] = tokens[:-1]
        self.shift_labels[row, place:stop] = tokens[1:]
        later = self.labels[row, place + 1 : stop + 1]
        later[:] = tokens[1 : len(later) + 1]

    def ignore(self, row: int, places: np.ndarray) -> None:
        """Let nothing be learned at places of a row (int64)."""
        self.shift_labels[row, places] = IGNORED
        self.labels[row, places[places < self.labels.shape[1] - 1] + 1] = IGNORED

    def end(self, row: int, place: int) -> None:
        """Fill what is left of a row from ``place`` on: padding without labels, which is a document of its own."""
        if place < self.input_ids.shape[1]:
            self.input_ids[row, place:] = self._pad_token_id
            self.shift_labels[row, place:] = IGNORED
            self.labels[row, place + 1 :] = IGNORED
            if self.begins is not None:
                self.begins[row, place] = True

    def batch(self) -> dict[str, np.ndarray]:
        """Return the batch as models take it.

        ``labels`` say the same as ``shift_labels`` where a model shifts by itself, except for the last position of a row, whose
        next token a model that shifts can't be told: transformers' models and :class:`kenotron.models.Decoder` use
        ``shift_labels`` when they are given both. ``position_ids`` are there where documents are marked; they begin anew with
        each, which is how these models keep documents apart.
        """
        found = {"input_ids": self.input_ids, "labels": self.labels, "shift_labels": self.shift_labels}
        if self.restarts_positions:
            assert self.begins is not None
            places = np.arange(self.input_ids.shape[1])
            found["position_ids"] = places - np.maximum.accumulate(np.where(self.begins[:, :-1], places, 0), axis=1)
        return found


class Samples(Protocol):
    """A corpus cut into samples of one length, read by number.

    Attributes:
        num_samples: in one pass over the corpus.
    """

    num_samples: int

    def fill(self, out: Rows, rows: np.ndarray, numbers: np.ndarray, phase: int) -> None:
        """Write samples into rows of a batch.

        Args:
            rows: where, int64 of shape (k,). numbers: which, each in ``range(num_samples)``, of that shape.
            phase: any number of 0 or more that stays the same through a pass; another one cuts the corpus elsewhere, if it can.
        """
        ...
