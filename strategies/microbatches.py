"""Split a batch of any structure into microbatches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from kenotron.callbacks_native import crc32c
from kenotron.parallel.pipeline import check_microbatches

#: A method of a LightningModule: what it returns for a batch is the number of samples in it.
NUM_SAMPLES = "num_samples"


def count_samples(batch: Any, loaders: Any, *, may_be_short: bool) -> Any:
    """Return how many samples are in a batch: a number, or containers of numbers where it comes from several loaders.

    Args:
        loaders: a data loader, or containers of those, which give a batch of the same structure.
        may_be_short: the batch may have fewer samples than its loader's batch size.

    Raises:
        ValueError: the size of the batch is not that of its loader.
    """
    if isinstance(loaders, Mapping | list | tuple):
        pairs = list(loaders.items()) if isinstance(loaders, Mapping) else list(enumerate(loaders))
        if type(loaders) is not type(batch) or len(batch) != len(pairs):
            raise ValueError(
                f"pp > 1: the batch is a {type(batch).__name__}, but comes from a {type(loaders).__name__} of {len(pairs)} "
                f"data loaders, so it is not known what is split into microbatches. {_REMEDY}"
            )
        # The shorter of several loaders starts over, or ends, somewhere in an epoch.
        found = {key: count_samples(batch[key], each, may_be_short=True) for key, each in pairs}
        return found if isinstance(loaders, Mapping) else list(found.values())
    if batch is None:  # of a loader that has come to its end
        return 0
    return _count(batch, _batch_size(loaders), may_be_short=may_be_short or _is_iterable(loaders))


_REMEDY = (
    f"Give the LightningModule a method {NUM_SAMPLES}(self, batch) that returns how many samples are in a batch (what has as "
    "many rows is split, everything else goes whole to every microbatch), or set microbatches=1, which splits nothing."
)


def _count(batch: Any, wanted: int | None, *, may_be_short: bool) -> int:
    first = _first_tensor(batch)
    if first is None:
        raise ValueError(
            f"pp > 1: the batch ({type(batch).__name__}) holds no tensor with a batch dimension, so it can't be split into "
            "microbatches. Return tensors, or containers of tensors, from the data loader, or set pp=1."
        )
    rows = list(batch) if isinstance(batch, list) and all(isinstance(part, Mapping) for part in batch) else []
    size = len(rows) or first.shape[0]
    full = (*_first_sizes(batch), len(batch) if isinstance(batch, list) else 0)
    if wanted in full and (size > wanted or not may_be_short):
        size = wanted
    elif wanted is not None and (size > wanted or (size < wanted and not may_be_short)):
        raise ValueError(
            f"pp > 1: the data loader's batch size is {wanted}, but the first tensor of the batch has the shape "
            f"{tuple(first.shape)}. Batches are split along the first dimension: put the samples there (batch_first=True). "
            f"Where a batch has other rows than samples: {_REMEDY}"
        )
    for tensor in tensors(batch):
        if tensor.ndim > 1 and tensor.shape[0] != size == tensor.shape[1]:
            raise ValueError(
                f"pp > 1: a batch of {size} samples has a tensor of shape {tuple(tensor.shape)}, which looks as if its samples "
                f"were in the second dimension. Put them first (batch_first=True). Where they are not: {_REMEDY}"
            )
    return size


def _batch_size(loader: Any) -> int | None:
    """Return the batch size of a data loader; ``None`` where the data set, or a sampler, makes batches of any size."""
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def _is_iterable(loader: Any) -> bool:
    """Return whether short batches come at any time: each worker of an iterable data set has a last one."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def leaves(counts: Any) -> list[int]:
    """Return the numbers in what `count_samples` returned."""
    if isinstance(counts, int):
        return [counts]
    return [leaf for part in (counts.values() if isinstance(counts, Mapping) else counts) for leaf in leaves(part)]


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


def split(batch: Any, counts: Any, num_microbatches: int) -> list[Any]:
    """Return one batch of the same structure per microbatch.

    Tensors whose first dimension is the batch are cut, and lists of as many samples: plain values, dicts, tensors of other
    sizes. Everything else is shared.

    Args:
        counts: the number of samples, or of those from each of several loaders, see `count_samples`.
    """
    return [_microbatch(batch, counts, num_microbatches, index) for index in range(num_microbatches)]


def _microbatch(batch: Any, counts: Any, number: int, index: int) -> Any:
    if isinstance(counts, Mapping):
        return {key: _microbatch(batch[key], count, number, index) for key, count in counts.items()}
    if isinstance(counts, list):
        parts = [_microbatch(part, count, number, index) for part, count in zip(batch, counts, strict=True)]
        return parts if isinstance(batch, list) else tuple(parts)
    sizes = shares(counts, number)
    start = sum(sizes[:index])
    return _slice(batch, counts, start, start + sizes[index]) if number > 1 else batch


def shares(size: int, number: int) -> list[int]:
    """Return how many of ``size`` samples each of ``number`` microbatches has."""
    return [size // number + (i < size % number) for i in range(number)]


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


def check_same_batch(batch: Any, group: dist.ProcessGroup, batch_idx: int) -> None:
    """Raise ``ValueError`` on all ranks of a group, which share samples, where they hold different batches.

    The first batches of each loader are compared, then fewer and fewer: a generator of a rank's own shows sooner or later.
    """
    if batch_idx & (batch_idx - 1):
        return
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, _checksum(batch), group=group)
    if len(set(found)) > 1:
        raise ValueError(
            f"ranks {dist.get_process_group_ranks(group)} share their samples, but loaded different batches (number "
            f"{batch_idx} of the loader). Shuffle and augment by a seed that does not depend on the rank "
            "(lightning.seed_everything), and split data over trainer.strategy.distributed_sampler_kwargs, not over the "
            "global rank and the world's size."
        )


def _checksum(value: Any) -> int:
    checksum = 0
    for tensor in tensors(value):
        data = tensor.detach().cpu().contiguous().view(-1)
        checksum = crc32c(data.view(torch.uint8).numpy().data, checksum)
    return crc32c("\0".join(_words(value)).encode(errors="replace"), checksum)


def _words(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a batch."""
    if isinstance(value, str | int | float):
        yield str(value)
    for part in _parts(value):
        yield from _words(part)


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

    @property
    def splits(self) -> bool:
        """Whether batches are split at all."""
        return self._wanted != 1

    def number(self, sizes: Sequence[int]) -> int:
        """Return into how many microbatches a batch is split.

        Args:
            sizes: how many samples it has of each loader. Of several, each microbatch has the same share.

        Raises:
            ValueError: a full batch that the number of microbatches does not divide; one too small for the schedule.
        """
        if not self.splits:
            return 1
        if len(sizes) == 1:
            return self._auto(sizes[0]) if self._wanted == "auto" else self._given(sizes[0])
        common, most = math.gcd(*sizes), 4 * self._pp if self._wanted == "auto" else self._wanted
        assert isinstance(most, int)
        for count in range(min(most, common), 0, -1):
            if common % count == 0 and self._goes(count):
                return count
        raise self._too_small(common)

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
        raise self._too_small(size)

    def _too_small(self, size: int) -> ValueError:
        return ValueError(
            f"a batch of {size} samples is too small for schedule={self._schedule!r} on pp={self._pp}. Use larger batches "
            "(drop_last=True for the last one), or schedule='1f1b'."
        )

    def _goes(self, count: int) -> bool:
        try:
            check_microbatches(self._schedule, count, self._pp)
        except ValueError:
            return False
        return True
