"""Rows of a matrix, taken and added by index, in one order: sums come out the same bit for bit, also on a GPU.

The index is made of blocks, in none of which a row appears twice. ``take_rows`` and ``add_rows`` are each other's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function


def take_rows(x: Tensor, index: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return ``x[index]``.

    Args:
        x: [rows, width]. index: [n]. blocks: sizes of the blocks of ``index``; their sum is n.
    """
    return cast(Tensor, _TakeRows.apply(x, index, tuple(blocks)))


def add_rows(x: Tensor, index: Tensor, blocks: Sequence[int], num_rows: int) -> Tensor:
    """Return [num_rows, width] in which row ``index[i]`` is the sum of all such ``x[i]``, summed in float32 at least.

    Args:
        x: [n, width]. index: [n]. blocks: sizes of the blocks of ``index``.
    """
    return cast(Tensor, _AddRows.apply(x, index, tuple(blocks), num_rows))


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, blocks: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(index)
        ctx.blocks, ctx.num_rows = blocks, x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return add_rows(grad, index, ctx.blocks, ctx.num_rows), None, None


class _AddRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, blocks: tuple[int, ...], num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.blocks = blocks
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((num_rows, *x.shape[1:]), dtype=dtype, device=x.device)
        for part, rows in zip(x.split(blocks), index.split(blocks), strict=True):
            total.index_add_(0, rows, part.to(dtype))
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return take_rows(grad, index, ctx.blocks), None, None, None
