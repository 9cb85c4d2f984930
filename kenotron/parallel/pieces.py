"""Where in the whole of a parameter the boxes lie that this rank holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor

from kenotron.checkpoint.format import Piece
from kenotron.parallel._torch import compute_local_shape_and_global_offset
from kenotron.parallel.shards import TensorShard


def local_pieces(shard: TensorShard, value: Tensor, rows: tuple[int, int] | None = None) -> tuple[Piece, ...]:
    """Return the boxes of the global tensor that lie in ``value``, which ``shard`` cuts and, where it is a DTensor, ZeRO 3.

    Owners of a box, where they differ within ``value``, are tp ranks.

    Args:
        rows: ``(start, count)`` of what ``value`` has of the local rows (ZeRO 1); ``None``: all.
    """
    return tuple(pieces_of(shard, rows if rows is not None else _zero_rows(value)))


def pieces_of(shard: TensorShard, rows: tuple[int, int] | None) -> Iterator[Piece]:
    """Yield the boxes of the global tensor that lie in a local one.

    Args:
        shard: what tp and ep left here. rows: ``(start, length)`` along dimension 0 of that, what ZeRO left here.
    """
    shape = shard.shape
    first, count = rows if rows is not None else (0, shape[0] if shape else 0)
    if shape and (count == 0 or 0 in shape):
        return
    zeros = (0,) * len(shape)
    if shard.dim is None or shard.dim > 0:
        segments = [(0, 0, shape[shard.dim] if shard.dim else 0)]
        if shard.dim is not None:
            starts = itertools.accumulate((length for _, length in shard.segments), initial=0)
            segments = [(begin, start, length) for begin, (start, length) in zip(starts, shard.segments, strict=False)]
        for begin, start, length in segments:
            box, where, offset = list(shape), list(zeros), list(zeros)
            if shape:
                box[0], offset[0] = count, first + (shard.experts[0] if shard.experts is not None else 0)
            if shard.dim is not None:
                box[shard.dim], where[shard.dim], offset[shard.dim] = length, begin, start
            yield Piece(local=tuple(where), offset=tuple(offset), shape=tuple(box))
        return
    for segment, low, length, at in _rows(shard, first, count):
        yield Piece(
            local=(low, *zeros[1:]),
            offset=(at, *zeros[1:]),
            shape=(length, *shape[1:]),
            owners=shard.shared[segment] if shard.shared else None,
        )


def held_rows(
    shard: TensorShard, value: Tensor, rows: tuple[int, int] | None = None
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield ``(start, length, tp ranks that hold them)`` of what is here of a parameter that is cut along dimension 0.

    Args:
        rows: ``(start, count)`` of what ``value`` has of the local rows; ``None``: what ZeRO 3 left.
    """
    for segment, low, length, _ in _rows(shard, *(rows or _zero_rows(value) or (0, shard.shape[0]))):
        yield low, length, shard.holders[segment]


def _rows(shard: TensorShard, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(segment, local start, length, global start)`` of segments of dimension 0, within which ZeRO's rows lie."""
    begin = 0
    for segment, (start, length) in enumerate(shard.segments):
        low, high = max(begin, first), min(begin + length, first + count)
        if low < high:
            yield segment, low - first, high - low, start + low - begin
        begin += length


def _zero_rows(value: Tensor) -> tuple[int, int] | None:
    """Return ``(start, length)`` of what ZeRO left here along dimension 0; ``None``: all."""
    if not isinstance(value, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return (offset[0], shape[0])
