"""The vocabulary-parallel embedding and losses, on plain slices.

Each tp rank holds an equal slice of the vocabulary, in the order of the ranks. What is exchanged are a few numbers per token;
nothing of the vocabulary's size is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kenotron.parallel.collectives import (
    Group,
    all_gather_stack,
    group_rank,
    group_size,
    reduce_from,
)

# The cross entropy works through its rows in pieces of this many logits: 64 MiB in float32, where a float32 copy of all
# of them beside bfloat16 logits would be the largest tensor of the step.
PIECE = 1 << 24

# ---- Embedding ------------------------------------------------------------------------------------------------------


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    start: int,
    group: Group,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return ``F.embedding`` over the whole vocabulary, of which each rank holds an equal number of rows.

    Args:
        ids: token ids in [0, V), any shape.
        weight: this rank's rows ``[V/tp, H]``; the first is that of token ``start``.
        padding_idx: a row that gets no gradient, counted in the whole vocabulary.
        max_norm: must be ``None``. The others are those of ``nn.Embedding``.

    Returns:
        ``[*ids.shape, H]``, the same on every rank.

    Raises:
        ValueError: ``max_norm`` is set.
        IndexError: an id is outside the vocabulary (on CUDA: a device-side assert, as in torch).
    """
    if max_norm is not None:
        raise ValueError(
            f"max_norm={max_norm}: a vocabulary-parallel embedding does not renormalise its rows in the forward pass. "
            "Set max_norm=None, or leave this embedding out of the tensor-parallel plan."
        )
    rows, hidden = weight.shape
    _check_range(ids, rows * group_size(group))
    if padding_idx is not None:
        padding_idx = padding_idx % (rows * group_size(group)) - start
        padding_idx = padding_idx if 0 <= padding_idx < rows else None
    row, elsewhere = _within(ids, start, rows)
    if scale_grad_by_freq or sparse:
        # Both see which rows were asked for, and the one that stands in for ids elsewhere was not. So look up only the
        # ids that lie here; their number makes the host wait for the device.
        found = F.embedding(row[~elsewhere], weight, padding_idx, None, norm_type, scale_grad_by_freq, sparse)
        out = found.new_zeros((*ids.shape, hidden)).index_put((~elsewhere,), found)
    else:
        out = F.embedding(row, weight, padding_idx).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return reduce_from(out, group)


# ---- Cross entropy --------------------------------------------------------------------------------------------------


def vocab_parallel_cross_entropy(
    local: Tensor,
    target: Tensor,
    group: Group,
    *,
    dim: int = -1,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return ``F.cross_entropy`` of logits of which each rank holds a slice, the same on every rank.

    One collective in the forward pass (three or four numbers per row and rank) and none backward; no tensor of the size
    of the vocabulary.

    Args:
        local: this rank's logits ``[..., V/tp, ...]``.
        target: classes in [0, V) or ``ignore_index``, int64, the shape of ``local`` without ``dim``.
        dim: the vocabulary. The others are those of ``F.cross_entropy``.

    Returns:
        The loss in float32 (float64 for float64 logits).

    Raises:
        IndexError: a target is outside the vocabulary (on CUDA: a device-side assert, as in torch).
    """
    width = local.shape[dim]
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    _check_range(target, width * group_size(group))
    rows = local.movedim(dim, -1).reshape(-1, width)
    loss = _CrossEntropy.apply(rows, target.flatten(), ignored.flatten(), label_smoothing, group)
    if reduction == "none":
        return cast(Tensor, loss.view(target.shape))
    return cast(Tensor, loss.sum() if reduction == "sum" else loss.sum() / ignored.logical_not().sum())


class _CrossEntropy(Function):
    """The loss of each row ``[N]`` of logits ``[N, V/tp]``; keeps the logits, and makes one such tensor backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, target: Tensor, ignored: Tensor, smoothing: float, group: Group) -> Tensor:
        width = rows.shape[1]
        column, elsewhere = _within(target, group_rank(group) * width, width)
        # Of this rank's slice: the largest logit, the sum of exp(x - largest), the target's logit, the sum of x.
        local = rows.new_empty((4 if smoothing else 3, rows.shape[0]), dtype=wide(rows))
        local[2] = rows.gather(1, column.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        for piece in _pieces(rows):
            local[0, piece], local[1, piece] = (x.squeeze(-1) for x in _peak_and_sum(rows[piece], -1))
            if smoothing:
                local[3, piece] = rows[piece].sum(-1, dtype=local.dtype)
        peaks, sums, picked, *totals = all_gather_stack(local, group).unbind(1)
        peak, log_sum = _combine(peaks, sums)
        loss = log_sum - (picked.sum(0) - peak)
        if smoothing:
            mean = totals[0].sum(0) / (width * group_size(group))
            loss = (1.0 - smoothing) * loss + smoothing * (log_sum - (mean - peak))
        ctx.save_for_backward(rows, column, elsewhere, ignored, peak, log_sum)
        ctx.smoothing, ctx.vocabulary = smoothing, width * group_size(group)
        return loss.masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(softmax - (1 - smoothing) · onehot - smoothing / V) · grad, of this rank's slice."""
        rows, column, elsewhere, ignored, peak, log_sum = ctx.saved_tensors
        scale = grad.masked_fill(ignored, 0.0).unsqueeze(-1)
        onehot = (1.0 - ctx.smoothing) * scale.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        over_sum = scale * log_sum.neg().exp().unsqueeze(-1)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for piece in _pieces(rows):
            x = torch.sub(rows[piece], peak[piece].unsqueeze(-1)).exp_().mul_(over_sum[piece])
            if ctx.smoothing:
                x -= scale[piece] * (ctx.smoothing / ctx.vocabulary)
            out[piece] = x.scatter_add_(1, column[piece].unsqueeze(-1), -onehot[piece])
        return out, None, None, None, None


def _pieces(rows: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // rows.shape[1])
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


# ---- Other reductions over the vocabulary ---------------------------------------------------------------------------


def log_normalizer(local: Tensor, dim: int, group: Group) -> tuple[Tensor, Tensor]:
    """Return the largest logit and, differentiable, ``log(sum(exp(logits - largest)))``, of size 1 along ``dim``.

    In float32 at least, and apart: beside a large logit the second would have no digits left in their sum.
    """
    return cast(tuple[Tensor, Tensor], _LogNormalizer.apply(local, dim, group))


class _LogNormalizer(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: Group) -> tuple[Tensor, Tensor]:
        peaks, sums = all_gather_stack(torch.stack(_peak_and_sum(local, dim)), group).unbind(1)
        peak, log_sum = _combine(peaks, sums)
        ctx.save_for_backward(local, peak, log_sum)
        ctx.mark_non_differentiable(peak)
        return peak, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        local, peak, log_sum = ctx.saved_tensors
        return (local - peak).sub_(log_sum).exp_().mul_(grad).to(local.dtype), None, None


def argmax(local: Tensor, dim: int, group: Group) -> Tensor:
    """Return the index of the largest logit, the first of equals, of size 1 along ``dim``."""
    value, index = local.detach().max(dim, keepdim=True)
    values = all_gather_stack(value, group)
    indices = all_gather_stack(index + group_rank(group) * local.shape[dim], group)
    return indices.gather(0, values.argmax(0, keepdim=True)).squeeze(0)


def pick(local: Tensor, dim: int, index: Tensor, group: Group) -> Tensor:
    """Return ``logits.gather(dim, index)``, the same on every rank."""
    width = local.shape[dim]
    _check_range(index, width * group_size(group))
    column, elsewhere = _within(index, group_rank(group) * width, width)
    return reduce_from(local.gather(dim, column).masked_fill(elsewhere, 0), group)


def _peak_and_sum(local: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return a slice's largest logit and sum(exp(x - largest)), in float32 at least and of size 1 along ``dim``."""
    # log_softmax is torch's one fused pass over this; at the largest logit it is -log(sum). (amax, sub, exp and sum one by
    # one move 2.5 times the bytes of bfloat16 logits.)
    log_softmax = torch.log_softmax(local, dim, dtype=wide(local))
    peak = local.amax(dim, keepdim=True).to(log_softmax.dtype)
    total = log_softmax.amax(dim, keepdim=True).neg_().exp_()
    return peak, total.masked_fill_(peak == -torch.inf, 0.0)  # all masked: nan in log_softmax, and adds nothing


def _combine(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit and log(sum(exp(x - largest))), from each rank's largest and sum ``[tp, ...]``."""
    peak = peaks.amax(0)
    peak = peak.masked_fill(peak.isinf(), 0.0)  # a row that is all masked has no logit to measure from
    return peak, (sums * (peaks - peak).exp()).sum(0).log()


def _within(index: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the indices counted from ``start``, 0 where that is not in [0, width), and where it is not."""
    index = index - start
    elsewhere = (index < 0) | (index >= width)
    return index.masked_fill(elsewhere, 0), elsewhere


def _check_range(index: Tensor, size: int) -> None:
    """Raise what torch raises for an index outside [0, size): without this, no rank would miss it."""
    # Looked up in one element that stands for all. On CUDA the kernel asserts, and the host need not wait for it.
    index.new_zeros(1).expand(size).index_select(0, index.flatten())


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
