"""What travels together: parameters in buckets, and rows of parameters in flat memory with a chunk for each rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Bytes that travel together, of gradients and of updated parameters.
BUCKET_BYTES = 25 * 2**20


class Rows(NamedTuple):
    """Rows of a parameter, along its first dimension."""

    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these rows of a tensor, as a view."""
        return tensor.narrow(0, self.start, self.length)

    def dense(self, tensor: Tensor) -> Tensor:
        """Return these rows without gaps between elements, which fused optimizers take for granted."""
        rows = self.of(tensor)
        return rows if self.length == tensor.shape[0] else rows.contiguous()


def rows_of(size: int, ranks: int, offset: int) -> list[Rows]:
    """Divide ``size`` rows among ranks as evenly as rows allow: of each rank in order.

    Args:
        offset: which rank begins, where some have a row more. Parameters with other offsets leave those to other ranks.
    """
    bounds = [size * part // ranks for part in range(ranks + 1)]
    parts = [Rows(start, end - start) for start, end in itertools.pairwise(bounds)]
    return parts if size % ranks == 0 else [parts[(rank + offset) % ranks] for rank in range(ranks)]


class Share(NamedTuple):
    """What each rank of a group updates of a parameter; ``is_whole``: one of them all of it."""

    group: dist.ProcessGroup
    rows: tuple[Rows, ...]
    own: Rows
    is_whole: bool = False

    @property
    def is_even(self) -> bool:
        """Whether each rank, in order, has equally many rows."""
        return all(rows.length == self.own.length and rows.start == rank * rows.length for rank, rows in enumerate(self.rows))


def fill(params: Iterable[nn.Parameter], kind: Callable[[nn.Parameter], Hashable]) -> list[list[nn.Parameter]]:
    """Put parameters into buckets of about ``BUCKET_BYTES``, in their order; those of a bucket are of one kind."""
    buckets: list[list[nn.Parameter]] = []
    open_ones: dict[Hashable, tuple[list[nn.Parameter], int]] = {}
    for param in params:
        members, size = open_ones.get(key := kind(param), ([], 0))
        if not members or size + param.nbytes > BUCKET_BYTES:
            members, size = [], 0
            buckets.append(members)
        members.append(param)
        open_ones[key] = (members, size + param.nbytes)
    return buckets


class Chunks:
    """Where the rows of some parameters lie in flat memory: for each rank a chunk with its rows of all of them.

    Parameters that the ranks divide evenly come first, so that each of them is copied in one piece for all ranks.

    Args:
        params: of one dtype. shares: of each, over the ranks of one group.
        extra: numbers at the end of each chunk. padded: chunks are of equal length.
    """

    def __init__(self, params: Sequence[nn.Parameter], shares: Sequence[Share], *, extra: int = 0, padded: bool = True) -> None:
        self._ranks, self._extra = len(shares[0].rows), extra
        self._shapes = [param.shape for param in params]
        self._rows = [share.rows for share in shares]
        self._even = {i for i, share in enumerate(shares) if padded and share.is_even}
        ends = [0] * self._ranks
        self._starts: list[list[int]] = [[] for _ in shares]
        for index in sorted(range(len(shares)), key=lambda i: i not in self._even):
            width = math.prod(self._shapes[index][1:])
            self._starts[index] = list(ends)
            ends = [end + rows.length * width for end, rows in zip(ends, self._rows[index], strict=True)]
        if padded:
            ends = [max(ends)] * self._ranks
        #: Elements of each rank's chunk.
        self.lengths = [end + extra for end in ends]
        self._offsets = list(itertools.accumulate(self.lengths, initial=0))

    def views(self, chunk: Tensor, rank: int) -> list[Tensor]:
        """Return a rank's rows of each parameter in its chunk."""
        found = []
        for index, (shape, rows) in enumerate(zip(self._shapes, self._rows, strict=True)):
            start, count = self._starts[index][rank], rows[rank].length * math.prod(shape[1:])
            found.append(chunk[start : start + count].view(rows[rank].length, *shape[1:]))
        return found

    def extras(self, memory: Tensor) -> list[Tensor]:
        """Return the numbers at the end of each chunk."""
        return [chunk[len(chunk) - self._extra :] for chunk in memory.split(self.lengths)]

    def pairs(
        self, memory: Tensor, wholes: Sequence[Tensor | None], without: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of all chunks with those of whole parameters (or of their gradients) which belong there.

        Args:
            wholes: ``None``: is left out. without: a rank whose rows may be left out.
        """
        for index, whole in enumerate(wholes):
            if whole is None:
                continue
            if index in self._even and whole.is_contiguous():
                rows = whole.view(self._ranks, -1)
                start = self._starts[index][0]
                yield memory.view(self._ranks, -1)[:, start : start + rows.shape[1]], rows
                continue
            for rank, found in enumerate(self._rows[index]):
                if found.length and rank != without:
                    part, start = found.of(whole), self._offsets[rank] + self._starts[index][rank]
                    yield memory[start : start + part.numel()].view(part.shape), part


class Scratch:
    """Flat memory that is used again on a CPU, where fresh pages cost more than copies into them: two buckets at most."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, like: Tensor, numel: int) -> Tensor:
        """Return memory of so many elements, of the dtype and on the device of ``like``."""
        for index, memory in enumerate(self._free):
            if memory.dtype == like.dtype and memory.device == like.device and len(memory) >= numel:
                return self._free.pop(index)[:numel]
        return like.new_empty(numel, requires_grad=False)

    def give(self, memory: Tensor) -> None:
        """Take back memory that nobody uses any more."""
        if memory.device.type == "cpu":
            self._free = [*self._free[-1:], memory if memory._base is None else memory._base]


def laid_out_like(param: Tensor, flat: Tensor) -> Tensor:
    """Return ``flat`` in a parameter's shape and, where that has no gaps, its strides, as fused optimizers expect."""
    extent = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
    if param.is_contiguous() or extent != param.numel() or 0 in param.stride():
        return flat.view(param.shape)
    return flat.as_strided(param.shape, param.stride(), flat.storage_offset())


@torch.no_grad()
def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    found = list(pairs)
    if found:
        torch._foreach_copy_([target for target, _ in found], [source for _, source in found])
