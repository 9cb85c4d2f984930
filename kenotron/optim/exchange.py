"""Whole matrices from parts that lie on many ranks, worked on by one rank each, and the results back.

1. Once, all ranks of the group: tell each other which boxes of which parameters they hold.
2. Every rank by itself, to the same result: cut parameters into *blocks* (a matrix, or a stack of experts' matrices) and give
   each to one of the ranks that hold a part of it, the least loaded one.
3. Every update, in rounds of a bounded size: each part goes to the block's rank (``all_to_all``), that works on the whole, and
   each rank that holds a part gets it back (``all_to_all``).

A rank sends and receives about twice what it holds, and does 1 / n of the work. Gathering everything everywhere would receive
n times what it holds, and do all the work n times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kenotron.parallel.collectives import all_to_all, group_rank, group_size

#: Elements that one rank works on in a round: 128 MiB in bfloat16.
ROUND = 2**26

Slices = tuple[slice, ...]
#: What a rank holds of one parameter: (offset in the local tensor, offset in the whole, extents) of each box.
Boxes = tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is worked on as a whole: a box of a parameter.

    Args:
        name: of the parameter. offset, shape: of the box, ``[out, in]`` or ``[experts, out, in]``.
    """

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def cost(self) -> int:
        """How much work it is, up to a factor: the size times the shorter side."""
        return math.prod(self.shape) * min(self.shape[-2:])


@dataclass(frozen=True)
class _Part:
    """A box that one rank holds of a block."""

    holder: int
    local: Slices  # in the holder's tensor
    inside: Slices  # in the block

    @property
    def numel(self) -> int:
        return math.prod(s.stop - s.start for s in self.inside)


@dataclass(frozen=True)
class _Job:
    """A block, the rank that works on it, and who holds what of it."""

    block: Block
    owner: int
    sent: tuple[_Part, ...]  # to the owner: each element once
    returned: tuple[_Part, ...]  # from the owner: to everyone who holds it


def blocks_of(name: str, shape: tuple[int, ...], out_dim: int, parts: Sequence[int], held: Sequence[Boxes]) -> list[Block]:
    """Cut a parameter into blocks.

    Args:
        shape: of the whole. out_dim: where outputs lie. parts: outputs of each layer in it; empty: one layer.
        held: the boxes of each rank of the group. Experts are cut where ranks' boxes are, and so that all ranks get some.
    """
    cuts = [(0, size) for size in shape]
    starts = [0, *itertools.accumulate(parts)] if parts else [0, shape[out_dim]]
    stacks = [(0, shape[0])]
    if len(shape) == 3:
        borders = {0, shape[0]}
        borders.update(range(0, shape[0], -(-shape[0] // len(held))))
        for _, offset, extent in itertools.chain.from_iterable(held):
            borders.update((offset[0], offset[0] + extent[0]))
        stacks = list(itertools.pairwise(sorted(borders)))
    blocks = []
    for stack, (start, end) in itertools.product(stacks, itertools.pairwise(starts)):
        box = list(cuts)
        box[out_dim] = (start, end)
        if len(shape) == 3:
            box[0] = stack
        blocks.append(Block(name=name, offset=tuple(a for a, _ in box), shape=tuple(b - a for a, b in box)))
    return [block for block in blocks if math.prod(block.shape)]


def _part(block: Block, holder: int, local: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> _Part | None:
    """Return what a box has of a block."""
    low = [max(a, b) for a, b in zip(offset, block.offset, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, block.offset, block.shape, strict=True)]
    if any(start >= end for start, end in zip(low, high, strict=True)):
        return None
    here = tuple(slice(p + a - o, p + b - o) for p, a, b, o in zip(local, low, high, offset, strict=True))
    inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, block.offset, strict=True))
    return _Part(holder, here, inside)


def _jobs(blocks: Sequence[Block], held: Mapping[str, Sequence[Boxes]], size: int) -> list[_Job]:
    """Give every block to a rank: the costliest first, to the least loaded of its holders."""
    loads, jobs = [0] * size, []
    for block in sorted(blocks, key=lambda block: -block.cost):
        parts = [
            part
            for holder, boxes in enumerate(held[block.name])
            for box in boxes
            if (part := _part(block, holder, *box)) is not None
        ]
        owner = min({part.holder for part in parts}, key=lambda rank: (loads[rank], rank))
        loads[owner] += block.cost
        sent: dict[tuple[tuple[int, int], ...], _Part] = {}
        for part in sorted(parts, key=lambda part: abs(part.holder - owner)):  # neighbours are near
            sent.setdefault(tuple((s.start, s.stop) for s in part.inside), part)
        assert sum(part.numel for part in sent.values()) == math.prod(block.shape), f"{block} is not covered"
        jobs.append(_Job(block, owner, tuple(sent.values()), tuple(parts)))
    return jobs


def _rounds(jobs: Sequence[_Job], size: int) -> list[list[_Job]]:
    """Cut the jobs into rounds in which no rank works on more than about ``ROUND`` elements."""
    rounds: dict[int, list[_Job]] = {}
    done = [0] * size
    for job in jobs:
        rounds.setdefault(done[job.owner] // ROUND, []).append(job)
        done[job.owner] += math.prod(job.block.shape)
    return [rounds[index] for index in sorted(rounds)]


class Exchange:
    """Runs a function of whole matrices on matrices that lie in parts.

    Args:
        blocks: the same on all ranks. held: by parameter, the boxes of each rank of the group. group: of these ranks.
    """

    def __init__(self, blocks: Sequence[Block], held: Mapping[str, Sequence[Boxes]], group: dist.ProcessGroup | None) -> None:
        self._group, self._rank, self._size = group, group_rank(group), group_size(group)
        self._rounds = _rounds(_jobs(blocks, held, self._size), self._size)

    def run(
        self,
        local: Mapping[str, Tensor],
        work: Callable[[Block, Tensor], Tensor],
        give: Callable[[Block, Slices, Tensor], None],
    ) -> None:
        """Work on every block. All ranks of the group call it.

        Args:
            local: what this rank holds of each parameter, all of one dtype. work: returns a tensor of the block's shape, on
                one rank for each block. give: takes this rank's part of the result, and where in the local tensor that lies.
        """
        for jobs in self._rounds:
            wholes = self._gather(jobs, local)
            self._give_back(jobs, [None if x is None else work(job.block, x) for job, x in zip(jobs, wholes, strict=True)],
                            local, give)  # fmt: skip

    def _gather(self, jobs: Sequence[_Job], local: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the blocks that this rank works on; ``None`` for the others."""
        arrived = self._swap(
            [[local[job.block.name][p.local] for job in jobs if job.owner == to for p in job.sent if p.holder == self._rank]
             if to != self._rank else [] for to in range(self._size)],
            [[p.numel for job in jobs if job.owner == self._rank for p in job.sent if p.holder == source]
             if source != self._rank else [] for source in range(self._size)],
            next(iter(local.values())),
        )  # fmt: skip
        wholes: list[Tensor | None] = []
        for job in jobs:
            if job.owner != self._rank:
                wholes.append(None)
                continue
            mine = local[job.block.name]
            if len(job.sent) == 1 and job.sent[0].holder == self._rank:
                wholes.append(mine[job.sent[0].local])
                continue
            whole = mine.new_empty(job.block.shape)
            for part in job.sent:
                own = part.holder == self._rank
                place = whole[part.inside]
                place.copy_(mine[part.local] if own else next(arrived[part.holder]).view(place.shape))
            wholes.append(whole)
        return wholes

    def _give_back(
        self,
        jobs: Sequence[_Job],
        results: Sequence[Tensor | None],
        local: Mapping[str, Tensor],
        give: Callable[[Block, Slices, Tensor], None],
    ) -> None:
        pairs = list(zip(jobs, results, strict=True))
        arrived = self._swap(
            [[x[p.inside] for job, x in pairs if x is not None for p in job.returned if p.holder == to]
             if to != self._rank else [] for to in range(self._size)],
            [[p.numel for job in jobs if job.owner == source for p in job.returned if p.holder == self._rank]
             if source != self._rank else [] for source in range(self._size)],
            next(iter(local.values())),
        )  # fmt: skip
        for job, result in pairs:
            for part in job.returned:
                if part.holder != self._rank:
                    continue
                shape = [s.stop - s.start for s in part.inside]
                mine = result[part.inside] if result is not None else next(arrived[job.owner]).view(shape)
                give(job.block, part.local, mine)

    def _swap(self, outgoing: list[list[Tensor]], incoming: list[list[int]], like: Tensor) -> list[Iterator[Tensor]]:
        """Send tensors to each rank; return those that came from each, flat, given their sizes."""
        if self._size == 1:
            return [iter(())]
        sent = [sum(x.numel() for x in tensors) for tensors in outgoing]
        flat = [x.reshape(-1) for tensors in outgoing for x in tensors]
        buffer = torch.cat(flat) if flat else like.new_empty(0)
        counts = [sum(sizes) for sizes in incoming]
        found = all_to_all(buffer, self._group, sent, counts)
        return [iter(part.split(sizes)) for part, sizes in zip(found.split(counts), incoming, strict=True)]
