"""Axis-aligned boxes of integers: where the pieces of a tensor lie. No torch here."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: The corner sums below cost 2^d for a tensor that is cut along d dimensions; real ones are cut along one to three.
MAX_CUT_DIMS = 8


class Box(NamedTuple):
    """The indices ``offset[d] <= i[d] < offset[d] + shape[d]``; of dimension 0 it is one single point."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many indices it holds."""
        return math.prod(self.shape)


def whole(shape: Sequence[int]) -> Box:
    """Return the box of all indices of a tensor of ``shape``."""
    return Box((0,) * len(shape), tuple(shape))


def is_inside(box: Box, shape: Sequence[int]) -> bool:
    """Tell whether ``box`` has as many dimensions as ``shape`` and lies within it."""
    return len(box.offset) == len(box.shape) == len(shape) and all(
        start >= 0 and extent >= 0 and start + extent <= size
        for start, extent, size in zip(box.offset, box.shape, shape, strict=True)
    )


def intersect(a: Box, b: Box) -> Box | None:
    """Return the indices that both boxes hold, or None where there are none."""
    start = tuple(map(max, a.offset, b.offset))
    shape = tuple(
        min(a_start + a_size, b_start + b_size) - first
        for first, a_start, a_size, b_start, b_size in zip(start, a.offset, a.shape, b.offset, b.shape, strict=True)
    )
    return Box(start, shape) if all(extent > 0 for extent in shape) else None


def find_flaw(boxes: Sequence[Box], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int] | None:
    """Return None where ``boxes`` tile ``shape`` exactly, else an index and how many boxes hold it (not one).

    A sum of boxes is determined by the signed sum of their corners (+1 at the lower corner, the sign turning with each
    dimension in which a corner is an upper one), because that is its mixed difference. So the boxes tile the whole
    exactly when their corners cancel against the whole's: linear in the number of boxes, where comparing them in pairs
    is quadratic. What holds at the lexicographically first corner that is left over is its sum, since no other corner
    lies below it.

    Args:
        boxes: boxes inside ``shape``; empty ones count for nothing.
        shape: the extents of the whole.

    Raises:
        ValueError: the boxes cut ``shape`` along more than ``MAX_CUT_DIMS`` dimensions.
    """
    everything = whole(shape)
    boxes = [box for box in boxes if box.volume]
    if boxes == [everything]:
        return None
    cut = [dim for dim, size in enumerate(shape) if any(box.offset[dim] != 0 or box.shape[dim] != size for box in boxes)]
    if len(cut) > MAX_CUT_DIMS:
        raise ValueError(f"the tensor is cut along {len(cut)} dimensions; the format allows {MAX_CUT_DIMS}")
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, box in itertools.chain(((1, box) for box in boxes), [(-1, everything)] if everything.volume else []):
        # A corner is upper (True) or lower (False) in each dimension that is cut.
        edges = [((box.offset[dim], False), (box.offset[dim] + box.shape[dim], True)) for dim in cut]
        for corner in itertools.product(*edges):
            num_upper = sum(upper for _, upper in corner)
            corners[tuple(at for at, _ in corner)] += -sign if num_upper % 2 else sign
    left_over = [corner for corner, count in corners.items() if count != 0]
    if not left_over:
        return None
    first = min(left_over)
    index = [0] * len(shape)
    for dim, at in zip(cut, first, strict=True):
        index[dim] = at
    return tuple(index), 1 + corners[first]
