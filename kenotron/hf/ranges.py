"""Boxes of a row-major array as runs of bytes: which there are, and which of them to read at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from kenotron.checkpoint.boxes import Box, is_inside, whole

#: How users write a box: (start, stop) for each dimension; None for the whole tensor.
Ranges = Sequence[tuple[int, int]] | None

#: Unwanted bytes that are read through rather than skipped, as in the native reader (reader.hpp).
GAP_BYTES = 128 << 10
#: What cannot be read straight to its place goes through a buffer of this size.
STAGING_BYTES = 8 << 20


def box_in(shape: tuple[int, ...], ranges: Ranges, name: str) -> Box:
    """Return the box that a user asks for; ValueError, which tells the tensor's ``name``, where it leaves ``shape``."""
    if ranges is None:
        return whole(shape)
    box = Box(tuple(start for start, _ in ranges), tuple(stop - start for start, stop in ranges))
    if not is_inside(box, shape):
        raise ValueError(
            f"{name}: box={ranges} does not lie in the shape {list(shape)}; "
            f"pass (start, stop) with 0 <= start <= stop <= size for each of its {len(shape)} dimensions"
        )
    return box


def runs_of(shape: tuple[int, ...], box: Box, item_bytes: int) -> tuple[Iterable[int], int]:
    """Return the runs of bytes that make up a box, in row-major order.

    Args:
        shape: of the array.
        box: inside of it.
        item_bytes: the size of an element.

    Returns:
        Where each run begins, in bytes from the array's first on, ascending; how many bytes each has.
    """
    if not box.volume:
        return (), 0
    if not shape:
        return (0,), item_bytes
    strides = [item_bytes * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # Behind the last dimension that is cut the box is as wide as the array, and what it has of that one is contiguous.
    cut = max((dim for dim, size in enumerate(shape) if box.shape[dim] != size), default=0)
    steps = [
        range(start * stride, (start + extent) * stride, stride)
        for start, extent, stride in zip(box.offset[:cut], box.shape[:cut], strides[:cut], strict=True)
    ]
    first = box.offset[cut] * strides[cut]
    return map(sum, itertools.product((first,), *steps)), box.shape[cut] * strides[cut]


def read_together(offsets: Iterable[int], run_bytes: int) -> Iterator[list[int]]:
    """Yield the runs in groups, each to be read at once with the gaps inside of it; one run alone may have any length."""
    group: list[int] = []
    for offset in offsets:
        if group and (offset - group[-1] - run_bytes > GAP_BYTES or offset + run_bytes - group[0] > STAGING_BYTES):
            yield group
            group = []
        group.append(offset)
    if group:
        yield group


def parts_of(shape: tuple[int, ...], max_items: int) -> Iterator[Box]:
    """Cut a shape into boxes of at most so many items, each contiguous in row-major order, ascending."""
    if math.prod(shape) <= max_items:
        yield whole(shape)
        return
    num_rows, zeros = max_items // math.prod(shape[1:]), (0,) * len(shape[1:])
    for start in range(0, shape[0], max(1, num_rows)):
        if num_rows:
            yield Box((start, *zeros), (min(num_rows, shape[0] - start), *shape[1:]))
        else:
            yield from (Box((start, *part.offset), (1, *part.shape)) for part in parts_of(shape[1:], max_items))
