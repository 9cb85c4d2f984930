"""Collectives that autograd understands, over one process group.

Each is named after what it does in the forward pass; the table says what its backward does. "Replicated" is a tensor
that is the same on every rank of the group, "partial" one whose sum over the ranks is meant, "sharded" one of which
each rank holds a slice.

    forward                                       backward
    copy_to             replicated → replicated   partial gradients are all-reduced
    copy_tail_to        replicated → replicated   gradients of the last columns, partial ones, are all-reduced
    reduce_from         partial → replicated      identity
    mean_from           each its own → mean       identity
    gather_from         sharded → replicated      own slice of the gradient (grad="slice", it is replicated), or
                                                  reduce-scatter (grad="reduce_scatter", it is partial)
    scatter_to          replicated → sharded      all-gather
    reduce_scatter_to   partial → sharded         all-gather
    all_to_all          rows → the ranks they are for   the gradients of rows go back

A backward is made of these same functions, so that each can be differentiated again. A dimension that the group does
not divide is cut as ``torch.tensor_split`` does: the first ranks hold one element more. Where there is nobody to
communicate with (``group=None``, or one rank) the input itself comes back; ``_alone`` decides that, and nothing else.

In eager mode plain ``torch.distributed`` calls, which cost half as much as functional ones on small tensors (gloo, 2 ranks,
8 elements: 1.0 against 2.2 ms on a busy CPU). Equal slices in compiled code go through functional collectives: torch's passes
know their form (see ``overlap``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from kenotron.parallel._torch import functional_all_gather, functional_reduce_scatter

Group = ProcessGroup | None
"""The ranks to communicate with; ``None``: this process is alone."""

# torch 2.13 renamed these two and warns about the names of before; pyproject.toml allows 2.11.
_RENAMED = hasattr(dist, "all_gather_single")
all_gather_single = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
_reduce_scatter_single = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Return ``x``, which all ranks hold alike and go on to use differently; backward sums their gradients."""
    return x if _alone(group) else _apply(_CopyTo, x, group)


def copy_tail_to(x: Tensor, width: int, group: Group) -> Tensor:
    """Return ``x``, of which all ranks go on to use the last ``width`` columns differently, and the others alike."""
    return x if _alone(group) else _apply(_CopyTailTo, x, width, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Return the sum of ``x`` over the ranks; backward hands the gradient through."""
    return x if _alone(group) else _apply(_ReduceFrom, x, group)


def mean_from(x: Tensor, group: Group) -> Tensor:
    """Return the mean of ``x`` over the ranks, whose gradients are averaged later; backward hands the gradient through."""
    return x if _alone(group) else _apply(_MeanFrom, x, group)


def gather_from(
    x: Tensor, dim: int, group: Group, *, grad: Literal["reduce_scatter", "slice"], size: int | None = None
) -> Tensor:
    """Return the ranks' slices put together along ``dim``.

    Args:
        x: this rank's slice.
        grad: ``"slice"`` where every rank computes the same from the result, so that each has the whole gradient;
            ``"reduce_scatter"`` where each rank computes its own share, so that the gradients must be summed.
        size: of ``dim`` in the result, as ``scatter_to`` cut it; ``None``: the slices are equal.
    """
    if _alone(group):
        return x
    dim = dim % x.ndim
    size = x.shape[dim] * group_size(group) if size is None else size
    return _apply(_GatherFrom, x, dim, group, grad, size)


def scatter_to(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's slice of ``x`` along ``dim``, in its own memory; backward gathers the slices' gradients."""
    return x if _alone(group) else _apply(_ScatterTo, x, dim % x.ndim, group)


def reduce_scatter_to(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's slice along ``dim`` of the sum of ``x`` over the ranks; backward gathers."""
    return x if _alone(group) else _apply(_ReduceScatterTo, x, dim % x.ndim, group)


def all_to_all(x: Tensor, group: Group, sent: list[int] | None = None, arrived: list[int] | None = None) -> Tensor:
    """Return the rows that the ranks have for this one, ordered by rank.

    Args:
        x: rows, ordered by the rank that gets them.
        sent, arrived: how many go to and come from each; ``None``: equally many.
    """
    return x if _alone(group) else _apply(_AllToAll, x, group, sent, arrived)


def all_gather_stack(x: Tensor, group: Group) -> Tensor:
    """Return every rank's ``x``, stacked along a new first dimension. Not differentiable."""
    if _alone(group):
        return x.unsqueeze(0)
    x = x.contiguous()
    # Flat, and unfolded after: of the forms that torch allows, the one that its compiler traces.
    joined = x.new_empty(group_size(group) * x.numel())
    all_gather_single(joined, x.view(-1), group=group)
    return joined.view(group_size(group), *x.shape)


def start_reduce_scatter(
    memory: Tensor, lengths: Sequence[int], group: ProcessGroup, dtype: torch.dtype, *, averages: bool = False
) -> Callable[[], Tensor]:
    """Start to sum flat memory over the ranks, of which each gets its chunk. Not differentiable.

    Args:
        lengths: of each rank's chunk. dtype: of the sum. averages: it is a mean; only with NCCL.

    Returns:
        A function that waits for this rank's chunk and returns it.
    """
    rank, chunks = group.rank(), memory.split(list(lengths))
    if memory.device.type == "cpu" and dist.get_backend(group) == "gloo":
        return _start_exchange(chunks, group, dtype)
    operation = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
    total = memory.new_empty(lengths[rank])
    work: Any
    if len(set(lengths)) == 1:
        work = _reduce_scatter_single(total, memory, op=operation, group=group, async_op=True)
    else:
        work = dist.reduce_scatter(total, list(chunks), op=operation, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return total.to(dtype)

    return wait


def _start_exchange(chunks: Sequence[Tensor], group: ProcessGroup, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Start to reduce-scatter from rank to rank. gloo's own is an all-reduce, and takes three times as long."""
    rank, size = group.rank(), group.size()
    arrived = [chunks[rank] if other == rank else torch.empty_like(chunks[rank]) for other in range(size)]
    works: list[Any] = []
    for step in range(1, size):
        source, target = (rank - step) % size, (rank + step) % size
        if len(chunks[rank]):
            works.append(dist.irecv(arrived[source].view(torch.uint8), group=group, group_src=source))
        if len(chunks[target]):
            works.append(dist.isend(chunks[target].view(torch.uint8), group=group, group_dst=target))

    def collect() -> Tensor:
        for work in works:
            work.wait()
        wide = torch.promote_types(dtype, torch.float32)
        first, second, *others = (each.to(wide) for each in arrived)
        total = second if rank == 0 else first  # which is no part of the memory that was sent
        torch.add(first, second, out=total)
        for other in others:
            total += other
        return total.to(dtype)

    return collect


def start_all_gather(memory: Tensor, lengths: Sequence[int], group: ProcessGroup) -> list[dist.Work]:
    """Start to fill flat memory with the chunks of all ranks, of which this one's is there. Not differentiable.

    Args:
        lengths: of each rank's chunk.

    Returns:
        What to wait for.
    """
    chunks = memory.split(list(lengths))
    if dist.get_backend(group) == "gloo" or len(set(lengths)) > 1:  # half as long as gloo's own all-gather
        sent = [
            dist.broadcast(chunk.view(torch.uint8), group=group, group_src=rank, async_op=True)
            for rank, chunk in enumerate(chunks)
            if len(chunk)
        ]
        return [work for work in sent if work is not None]
    return [all_gather_single(memory, chunks[group.rank()], group=group, async_op=True)]


def group_size(group: Group) -> int:
    """Return how many ranks share the work."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Return where this process stands among them."""
    return 0 if group is None else group.rank()


def split_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return ``(start, length)`` of part ``index`` when ``size`` elements are cut as ``torch.tensor_split`` does."""
    length, longer = divmod(size, parts)
    return index * length + min(index, longer), length + (index < longer)


def _alone(group: Group) -> bool:
    return group is None or group.size() == 1


def _apply(function: type[Function], x: Tensor, *args: Any) -> Tensor:
    return cast(Tensor, function.apply(x, *args))


# ---- What is sent ---------------------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x: Tensor, dim: int, group: ProcessGroup, size: int) -> Tensor:
    """Return the slices joined along ``dim``, which is ``size`` long; ``x`` is this rank's."""
    parts = group.size()
    if size % parts == 0 and torch.compiler.is_compiling():
        return functional_all_gather(x.contiguous(), dim, group)
    longest = split_bounds(size, parts, 0)[1]
    stacked = all_gather_stack(_pad(x, dim, longest), group)
    if size % parts == 0:
        # [parts, ..., longest, ...] → [..., parts × longest, ...]: a view where nothing but ones stands before dim.
        return stacked.movedim(0, dim).flatten(dim, dim + 1)
    lengths = [split_bounds(size, parts, index)[1] for index in range(parts)]
    return torch.cat([piece.narrow(dim, 0, length) for piece, length in zip(stacked, lengths, strict=True)], dim)


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's slice along ``dim`` of the sum over the ranks."""
    parts = group.size()
    if x.shape[dim] % parts == 0 and torch.compiler.is_compiling():
        return functional_reduce_scatter(x, "sum", dim, group)
    bounds = [split_bounds(x.shape[dim], parts, index) for index in range(parts)]
    longest, own = bounds[0][1], bounds[group.rank()][1]
    # One contiguous block for each rank.
    if x.shape[dim] % parts == 0:
        blocks = x.unflatten(dim, (parts, longest)).movedim(dim, 0).contiguous()
    else:
        blocks = torch.stack([_pad(x.narrow(dim, start, length), dim, longest) for start, length in bounds])
    total = x.new_empty(blocks.numel() // parts)
    _reduce_scatter_single(total, blocks.view(-1), group=group)
    return total.view(blocks.shape[1:]).narrow(dim, 0, own).contiguous()


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros((*x.shape[:dim], missing, *x.shape[dim + 1 :]))], dim)


# ---- What autograd sees ---------------------------------------------------------------------------------------------


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_from(grad, ctx.group), None


class _CopyTailTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, group: ProcessGroup) -> Tensor:
        ctx.width, ctx.group = width, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        head, tail = grad.split([grad.shape[-1] - ctx.width, ctx.width], dim=-1)
        return torch.cat([head, reduce_from(tail, ctx.group)], dim=-1), None, None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return copy_to(grad, ctx.group), None


class _MeanFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group) / group.size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, grad: str, size: int) -> Tensor:
        ctx.dim, ctx.group, ctx.grad = dim, group, grad
        return _all_gather(x, dim, group, size).detach()  # not a view for autograd: it may be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = reduce_scatter_to if ctx.grad == "reduce_scatter" else scatter_to
        return back(grad, ctx.dim, ctx.group), None, None, None, None


class _ScatterTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group, ctx.size = dim, group, x.shape[dim]
        start, length = split_bounds(x.shape[dim], group.size(), group.rank())
        # A copy: a view would keep all of x alive, and could not be changed in place by what follows.
        return x.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_from(grad, ctx.dim, ctx.group, grad="slice", size=ctx.size), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sent: list[int] | None, arrived: list[int] | None) -> Tensor:
        ctx.group, ctx.sent, ctx.arrived = group, sent, arrived
        out = x.new_empty((x.shape[0] if arrived is None else sum(arrived), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), arrived, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(grad, ctx.group, ctx.arrived, ctx.sent), None, None, None


class _ReduceScatterTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group, ctx.size = dim, group, x.shape[dim]
        return _reduce_scatter(x, dim, group).detach()  # as in _GatherFrom

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_from(grad, ctx.dim, ctx.group, grad="reduce_scatter", size=ctx.size), None, None
