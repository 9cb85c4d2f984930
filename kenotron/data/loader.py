"""Batches for one data-parallel rank, prepared by worker processes, as iterables that any loop takes.

A worker prepares whole batches, and which ones follows from the sample that a batch begins with: neither the number of workers
nor that of ranks changes which samples a batch of all ranks holds, nor their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kenotron.data.rows import Samples
from kenotron.data.stages import after_batches
from kenotron.data.stream import Consumed, Sampling, Stream


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are prepared.

    Args:
        num_workers: processes that prepare batches; 0: the training process itself. prefetch: batches ready per worker.
        pin_memory: copy batches to page-locked memory; ``None``: where there is a GPU.

    Raises:
        ValueError: a negative number, or no batch to be ready.
    """

    num_workers: int = 2
    prefetch: int = 4
    pin_memory: bool | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers}: set 0 to prepare batches in the training process, or more.")
        if self.prefetch < 1:
            raise ValueError(f"prefetch={self.prefetch}: set how many batches a worker has ready, 1 or more.")

    def iterate(self, dataset: Dataset[Any], requests: Any, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Return what the dataset answers to each request, in their order."""
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=device.type == "cuda" if self.pin_memory is None else self.pin_memory,
            # Of its own: the global one would be drawn from at each start, which a resumed run has at other times.
            generator=torch.Generator(),
        )
        return iter(loader)


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------------------ training


class _Batches(Dataset[dict[str, Tensor]]):
    """One rank's part of any batch: the answer to (first sample, samples of all ranks)."""

    def __init__(self, stream: Stream, rank: int, num_ranks: int, vocab_size: int | None) -> None:
        self._stream, self._rank, self._num_ranks, self._vocab_size = stream, rank, num_ranks, vocab_size

    def __getitem__(self, request: tuple[int, int]) -> dict[str, Tensor]:
        first, count = request
        own = count // self._num_ranks
        batch = self._stream.batch(first + self._rank * own, own)
        self._check_ids(batch, first + self._rank * own, own)
        return _tensors(batch)

    def _check_ids(self, batch: dict[str, np.ndarray], first: int, count: int) -> None:
        """Refuse what would be an index error on a GPU, far from its cause."""
        smallest = int(batch["input_ids"].min())
        largest = max(int(batch["input_ids"].max()), int(batch["shift_labels"].max()))
        if smallest < 0 or (self._vocab_size is not None and largest >= self._vocab_size):
            raise ValueError(
                f"samples {first} to {first + count - 1} of the run, of {', '.join(self._stream.corpora_of(first, count))}, "
                f"hold token ids from {smallest} to {largest}; the model knows those from 0 to "
                f"{(self._vocab_size or 2**63) - 1}. Tokenise with the model's tokenizer."
            )


class _Requests:
    """What follows a sample: batch after batch, without an end."""

    def __init__(self, stream: Stream, first: int, accumulate: int) -> None:
        self._segments, self._first, self._accumulate = stream.segments, first, accumulate

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self._first
        while True:
            following = after_batches(self._segments, first, 1, self._accumulate)
            yield first, following - first
            first = following


class TrainLoader:
    """The training batches of a rank, from wherever the run is: each iteration begins at the first sample not yet trained.

    A batch is a dict of int64 tensors of shape (samples of this rank, sequence length), named as
    :meth:`kenotron.data.rows.Rows.batch` tells.

    Args:
        stream: the run's samples. position: returns how many of them have been trained.
        rank, num_ranks: the data-parallel rank, and how many there are; each gets a run of every batch's samples.
        accumulate: batches of an optimizer step; with ``num_ranks`` it divides all batch sizes that are to come.
        num_batches: of an iteration.
        vocab_size: ids from there on are refused; ``None``: unknown.
        loading, device: how and for what device batches are prepared.
    """

    def __init__(
        self,
        stream: Stream,
        position: Callable[[], int],
        *,
        rank: int,
        num_ranks: int,
        accumulate: int,
        num_batches: int,
        vocab_size: int | None,
        loading: Loading,
        device: torch.device,
    ) -> None:
        self._stream, self._position, self._accumulate = stream, position, accumulate
        self._num_batches, self._loading, self._device = num_batches, loading, device
        self._batches = _Batches(stream, rank, num_ranks, vocab_size)
        # By this name Lightning's loops find it when they are done, and stop its workers.
        self._iterator: Iterator[dict[str, Tensor]] | None = None
        self._next = -1

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first = self._position()
        if self._iterator is None or self._next != first:  # else it goes on, with what its workers have ready
            requests = _Requests(self._stream, first, self._accumulate)
            self._iterator, self._next = self._loading.iterate(self._batches, requests, self._device), first
        for _ in range(self._num_batches):
            batch = next(self._iterator)
            self._next = after_batches(self._stream.segments, self._next, 1, self._accumulate)
            yield batch

    def consumed(self) -> dict[str, Consumed]:
        """Return what has been trained of each corpus so far."""
        return self._stream.consumed(self._position())

    # Lightning's loops take a loader with these for one that can be resumed. Where it goes on is the data module's to keep.

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


# ---------------------------------------------------------------------------------------------------------- validation


class _Shares(Dataset[dict[str, Tensor]]):
    """One rank's samples of each validation batch."""

    def __init__(self, loader: ValidationLoader) -> None:
        self._samples, self._sampling, self._length = loader.samples, loader.sampling, loader.sequence_length
        self._shares = loader.shares

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = np.array(self._shares(index) or [self._samples.num_samples - 1])
        out = self._sampling.rows(len(numbers), self._length)
        self._samples.fill(out, np.arange(len(numbers)), numbers, 0)
        return _tensors(out.batch())


@dataclass(frozen=True)
class _Split:
    """Which samples of a validation batch are a rank's."""

    num_samples: int
    batch: int
    rank: int
    num_ranks: int

    def __call__(self, index: int) -> list[int]:
        first = index * self.batch * self.num_ranks
        count = min(self.batch * self.num_ranks, self.num_samples - first)
        return list(range(first + count * self.rank // self.num_ranks, first + count * (self.rank + 1) // self.num_ranks))


class ValidationLoader:
    """A corpus in its own order, each sample on one rank.

    All ranks have equally many batches, as collectives in a model need it. Where fewer samples are left than there are ranks,
    some get the corpus' last one once more: ``counts`` tells which batches are such.

    Args:
        name: of the corpus. samples, sampling, sequence_length: what it is made of. batch: samples of a rank's batch.
        rank, num_ranks: the data-parallel rank, and how many there are.
        loading, device: how and for what device batches are prepared.
    """

    def __init__(
        self,
        name: str,
        samples: Samples,
        sampling: Sampling,
        sequence_length: int,
        *,
        batch: int,
        rank: int,
        num_ranks: int,
        loading: Loading,
        device: torch.device,
    ) -> None:
        self.name, self.samples, self.sampling, self.sequence_length = name, samples, sampling, sequence_length
        self.shares = _Split(samples.num_samples, batch, rank, num_ranks)
        self._num_batches = -(-samples.num_samples // (batch * num_ranks))
        self._loading, self._device = loading, device

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self._loading.iterate(_Shares(self), range(self._num_batches), self._device)

    def counts(self, index: int) -> bool:
        """Return whether a batch of this rank holds samples that no other rank has."""
        return bool(self.shares(index))
