"""Split a batch of any structure into microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kenotron.callbacks_native import crc32c
from kenotron.parallel.pipeline import check_microbatches


def batch_size(batch: Any) -> int:
    """Return the size of the first dimension of the first tensor in ``batch``.

    Raises:
        ValueError: there is no tensor with a dimension.
    """
    tensor = _first_tensor(batch)
    if tensor is None:
        raise ValueError(
            f"pp > 1: the batch ({type(batch).__name__}) holds no tensor with a batch dimension, so it can't be split into "
            "microbatches. Return tensors, or containers of tensors, from the data loader, or set pp=1."
        )
    return tensor.shape[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim else None
    return next((found for part in _parts(value) if (found := _first_tensor(part)) is not None), None)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return one batch of the same structure per entry of ``sizes``.

    Tensors whose first dimension is the batch are cut, and lists of as many samples: plain values, dicts, tensors of other
    sizes. Everything else is shared.
    """
    total, start, found = sum(sizes), 0, []
    for size in sizes:
        found.append(_slice(batch, total, start, start + size))
        start += size
    return found


def _slice(value: Any, total: int, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and value.shape[0] == total else value
    if isinstance(value, Mapping):
        parts = {key: _slice(part, total, start, stop) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        if _is_of_samples(value, total):
            return value[start:stop]
        parts_list = [_slice(part, total, start, stop) for part in value]
        return type(value)(*parts_list) if hasattr(value, "_fields") else type(value)(parts_list)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _slice(getattr(value, name), total, start, stop) for name in names})
    return value


def _is_of_samples(value: list[Any] | tuple[Any, ...], total: int) -> bool:
    """Return whether a list has an entry for each sample, rather than parts of which each is a batch."""
    if len(value) != total or hasattr(value, "_fields"):
        return False
    if not any(isinstance(part, Tensor | Mapping | list | tuple) for part in value):
        return True
    if not isinstance(value, list):
        return False
    sizes = [tuple(_first_sizes(part)) for part in value]
    ragged = all(isinstance(part, Mapping) for part in value) and len(set(sizes)) > 1
    return ragged or not any(total in part for part in sizes)


def _first_sizes(value: Any) -> Iterator[int]:
    """Yield the sizes of the first dimensions of all tensors, and of lists of plain values, in a part of a batch."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value.shape[0]
        return
    parts = _parts(value)
    if isinstance(value, list | tuple) and not any(_parts(part) or isinstance(part, Tensor) for part in parts):
        yield len(parts)
    for part in parts:
        yield from _first_sizes(part)


def shape_key(value: Any) -> Any:
    """Return what decides the shapes of a forward pass: the structure of ``value``, its tensors' shapes and dtypes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    parts = _parts(value)
    if parts:
        return type(value).__name__, tuple(shape_key(part) for part in parts)
    return type(value).__name__


def check_same_batch(batch: Any, dp_rank: int) -> None:
    """Raise ``ValueError`` on all ranks where ranks of one data-parallel coordinate hold different batches."""
    checksum = 0
    for tensor in tensors(batch):
        data = tensor.detach().cpu().contiguous().view(-1)
        checksum = crc32c(data.view(torch.uint8).numpy().data, checksum)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (dp_rank, checksum))
    for coordinate in {rank for rank, _ in found}:
        ranks = [i for i, (rank, _) in enumerate(found) if rank == coordinate]
        if len({found[i][1] for i in ranks}) > 1:
            raise ValueError(
                f"ranks {ranks} share the samples of data-parallel rank {coordinate}, but loaded different batches. Shuffle by "
                "a seed that does not depend on the rank (lightning.seed_everything), and no sampler by global rank."
            )


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the dense tensors with elements in a batch of any structure."""
    if isinstance(value, Tensor):
        if value.numel() and not value.is_sparse:
            yield value
        return
    for part in _parts(value):
        yield from tensors(part)


class Splitter:
    """Decides into how many microbatches a batch is split.

    Args:
        microbatches: the number, or ``"auto"``: four per stage's rank where the batch allows, rather an even split.
        schedule, pp: what the number must go with.
    """

    def __init__(self, microbatches: int | Literal["auto"], schedule: str, pp: int) -> None:
        self._wanted = microbatches
        self._schedule = schedule
        self._pp = pp
        self._largest = 0

    def sizes(self, size: int) -> list[int]:
        """Return the size of each microbatch for a batch of ``size``.

        Raises:
            ValueError: a full batch that the number of microbatches does not divide; one too small for the schedule.
        """
        count = self._auto(size) if self._wanted == "auto" else self._given(size)
        return [size // count + (i < size % count) for i in range(count)]

    def _given(self, size: int) -> int:
        assert self._wanted != "auto"
        full = size >= self._largest
        self._largest = max(self._largest, size)
        if full and size % self._wanted:
            allowed = [count for count in range(1, size + 1) if size % count == 0 and self._goes(count)]
            raise ValueError(
                f"a batch of {size} samples per data-parallel rank is not divisible by microbatches={self._wanted}. Set "
                f"microbatches to one of {allowed}, change the batch size, or set microbatches='auto'."
            )
        # The last batch of an epoch may be smaller: as many microbatches as it fills.
        return self._largest_that_goes(min(self._wanted, size), size)

    def _auto(self, size: int) -> int:
        most = min(size, 4 * self._pp)
        for count in range(most, 2 * self._pp - 1, -1):
            if size % count == 0 and self._goes(count):
                return count
        return self._largest_that_goes(most, size)

    def _largest_that_goes(self, most: int, size: int) -> int:
        for count in range(most, 0, -1):
            if self._goes(count):
                return count
        raise ValueError(
            f"a batch of {size} samples is too small for schedule={self._schedule!r} on pp={self._pp}. Use larger batches "
            "(drop_last=True for the last one), or schedule='1f1b'."
        )

    def _goes(self, count: int) -> bool:
        try:
            check_microbatches(self._schedule, count, self._pp)
        except ValueError:
            return False
        return True
