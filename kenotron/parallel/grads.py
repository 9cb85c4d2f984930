"""Gradients over all axes: sums that are still owed before the update, and the one true norm."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kenotron.layout import ParallelLayout
from kenotron.parallel.buckets import Rows
from kenotron.parallel.pieces import held_rows
from kenotron.parallel.shards import Shards


def local(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nowhere(param: nn.Parameter) -> Rows | None:
    """Say of any parameter that it is whole."""
    return None


def _whole(param: nn.Parameter) -> list[Tensor]:
    return [local(_gradient(param))]


@torch.no_grad()
def sum_gradients(
    params: Sequence[nn.Parameter],
    group: dist.ProcessGroup,
    parts: Callable[[nn.Parameter], Iterable[Tensor]] = _whole,
) -> None:
    """Sum the gradients of ``params`` over ``group`` in one collective per dtype; a missing one counts as zero.

    What no rank has a gradient of keeps none, so that optimizers leave it alone: flags follow in a small collective.

    Args:
        parts: what is summed of each gradient.
    """
    missing = [param.grad is None for param in params]
    _sum((part for param in params for part in parts(param)), group)
    flags = torch.tensor([0.0 if none else 1.0 for none in missing], device=params[0].device)
    dist.all_reduce(flags, group=group)
    if any(missing):  # the flags are read only where this rank has no gradient
        for param, none, flag in zip(params, missing, flags, strict=True):
            if none and not flag > 0:
                param.grad = None


def _gradient(param: nn.Parameter) -> Tensor:
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def _gradients_of_rows(rows: Mapping[nn.Parameter, Sequence[tuple[int, int]]], param: nn.Parameter) -> list[Tensor]:
    return [_gradient_rows(param, *each) for each in rows[param]]


def _gradient_rows(param: nn.Parameter, start: int, length: int) -> Tensor:
    return local(_gradient(param)).narrow(0, start, length)


def _sum(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for grads in by_dtype.values():
        if len(grads) == 1 and grads[0].is_contiguous():
            dist.all_reduce(grads[0], group=group)
            continue
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)])


class OwedSums:
    """Gradients that are only this rank's share after the backward pass, and the groups over which they are summed.

    Weights that work on slices of a sequence or on split heads (tp), KV heads that several tp ranks share, and weights
    that several pipeline stages use (tied embeddings, loose parameters of the root).

    Args:
        shards: what this rank holds. tp_group: the tp axis.
        kv_groups: how many tp ranks share a KV head -> those that share this rank's; empty where none are shared.
        pp_groups: pipeline ranks (as in ``shards.holders``) -> their group.

    Attributes:
        placed: a parameter -> the rows that it is at the moment; ``None``: it is whole.
    """

    def __init__(
        self,
        shards: Shards,
        tp_group: dist.ProcessGroup,
        kv_groups: Mapping[int, dist.ProcessGroup],
        pp_groups: Mapping[tuple[int, ...], dist.ProcessGroup],
    ) -> None:
        self._by_group: list[tuple[set[str], dist.ProcessGroup]] = []
        if shards.tp > 1:  # ``partial`` may grow when the first graph is seen
            self._by_group.append((shards.partial, tp_group))
        self._shards, self._kv_groups = shards, kv_groups
        self.placed: Callable[[nn.Parameter], Rows | None] = nowhere
        for holders, group in pp_groups.items():
            self._by_group.append(({name for name, who in shards.holders.items() if who == holders}, group))

    def pay(self, params: Mapping[str, nn.Parameter]) -> None:
        """Sum what is owed. All ranks call it with the same names trained."""
        for names, group in self._by_group:
            members = _trained(names, params)
            if members:
                sum_gradients(members, group)
        for size, group in self._kv_groups.items():
            rows = self._shared_rows(params, size)
            if rows:
                parts = functools.partial(_gradients_of_rows, rows)
                sum_gradients(list(rows), group, parts)

    def _shared_rows(self, params: Mapping[str, nn.Parameter], size: int) -> dict[nn.Parameter, list[tuple[int, int]]]:
        """Return the rows, as start and length, that ``size`` tp ranks hold."""
        found: dict[nn.Parameter, list[tuple[int, int]]] = defaultdict(list)
        for name in sorted(self._shards.shared_kv & params.keys()):
            for param in _trained({name}, params):
                for start, length, ranks in held_rows(self._shards.by_name[name], param, self.placed(param)):
                    if len(ranks) == size:
                        found[param].append((start, length))
        return found

    def members(self, params: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters whose gradients `pay` sums, all of them or some rows."""
        shared = self._shards.shared_kv if self._kv_groups else set()
        return _trained(shared.union(*(names for names, _ in self._by_group)), params)

    def __bool__(self) -> bool:
        return bool(self._by_group or self._kv_groups)


def _trained(names: set[str], params: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    found = (params[name] for name in sorted(names) if name in params)
    return [param for param in found if param.requires_grad and param.numel()]


class GradientNorm:
    """The norm of the whole gradient, every element counted once, in one collective over all ranks.

    Each rank sums what it holds, weighted by one over the number of ranks that hold the same elements.

    Args:
        layout: resolved layout. shards: what this rank holds.

    Attributes:
        placed: as in `OwedSums`.
    """

    def __init__(self, layout: ParallelLayout, shards: Shards) -> None:
        self._layout = layout
        self._shards = shards
        self.placed: Callable[[nn.Parameter], Rows | None] = nowhere

    def _parts(self, name: str, param: nn.Parameter, grad: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the parts of a gradient, each with how many ranks hold the same elements."""
        layout, shard = self._layout, self._shards.of(name, param)
        spread = 1 if shard.experts is None else layout.ep
        rows = self.placed(param)
        is_part = isinstance(param, DTensor) or rows is not None
        dp = layout.dp_replicate if is_part else layout.dp_size * layout.cp // spread
        copies = dp * len(self._shards.holders.get(name, (0,)))
        if not shard.shared:
            yield copies * len(shard.replicas), grad
            return
        for start, length, ranks in held_rows(shard, param, rows):
            yield copies * len(ranks), grad.narrow(0, start, length)

    @torch.no_grad()
    def __call__(self, params: Mapping[str, nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm of the gradients of ``params`` as a 0-dim float32 tensor, the same on all ranks.

        Args:
            params: name -> parameter; those without a gradient are skipped.
        """
        by_copies: dict[int, list[Tensor]] = defaultdict(list)
        device = torch.device("cpu")
        for name, param in params.items():
            device = param.device
            if param.grad is not None and param.numel():
                for copies, part in self._parts(name, param, local(param.grad)):
                    by_copies[copies].append(part)
        distributed = self._layout.world_size > 1
        if math.isinf(norm_type):
            largest = [g.abs().max().float() for grads in by_copies.values() for g in grads if g.numel()]
            total = torch.stack(largest).max() if largest else torch.zeros((), device=device)
            if distributed:
                dist.all_reduce(total, op=dist.ReduceOp.MAX)
            return total
        total = torch.zeros((), device=device)
        for copies, grads in by_copies.items():
            # torch widens to the dtype that it is given, but never narrows: float64 gradients keep theirs.
            double = [grad for grad in grads if grad.dtype == torch.float64]
            single = [grad for grad in grads if grad.dtype != torch.float64]
            norms: list[Tensor] = [
                *(torch._foreach_norm(single, norm_type, dtype=torch.float32) if single else ()),
                *(norm.float() for norm in (torch._foreach_norm(double, norm_type) if double else ())),
            ]
            total = total + torch.stack(norms).pow(norm_type).sum() / copies
        if distributed:
            dist.all_reduce(total)
        return total.pow(1.0 / norm_type)

    def _parts_of(self, params: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, int, Tensor]]:
        for name, param in params.items():
            if param.grad is not None and param.numel():
                for copies, part in self._parts(name, param, local(param.grad)):
                    if part.numel():
                        yield name, copies, part

    @torch.no_grad()
    def of_sets(self, params: Mapping[str, nn.Parameter], sets: Mapping[str, Collection[str]], device: torch.device) -> Tensor:
        """Return the norms of the gradients of sets of parameters, float64 ``[sets]``, in one collective. All ranks call it.

        Args:
            params: this rank's. sets: the names in each, the same on all ranks; parameters of other stages among them.
        """
        squares = torch.zeros(len(sets), dtype=torch.float64, device=device)
        found = list(self._parts_of(params))
        if found:
            norms = torch.stack([torch.linalg.vector_norm(part, dtype=_wide(part)).double() for _, _, part in found])
            own = norms.square() / torch.tensor([copies for _, copies, _ in found], device=device)
            rows = _rows_of(sets)
            pairs = [(row, i) for i, (name, _, _) in enumerate(found) for row in rows.get(name, ())]
            row, index = torch.tensor(pairs, device=device).reshape(-1, 2).unbind(1)
            squares.index_add_(0, row, own[index])
        if self._layout.world_size > 1:
            dist.all_reduce(squares)
        return squares.sqrt()

    @torch.no_grad()
    def histograms(
        self, params: Mapping[str, nn.Parameter], sets: Mapping[str, Collection[str]], edges: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return how many elements of each set's gradients lie between edges, and what they span. All ranks call it.

        Args:
            edges: ascending ``[edges]``, on the device.

        Returns:
            Counts, float64 ``[sets, edges + 1]``, and ``[sets, 2]``: the least and the greatest.
        """
        counts = torch.zeros(len(sets), edges.numel() + 1, dtype=torch.float64, device=edges.device)
        span = counts.new_full((len(sets), 2), -math.inf)  # of -least and greatest
        rows = _rows_of(sets)
        for name, copies, part in self._parts_of(params):
            values = part.flatten().to(edges.dtype)
            own = torch.zeros_like(counts[0]).scatter_add_(0, torch.bucketize(values, edges), torch.ones_like(values).double())
            extremes = torch.stack([-values.min(), values.max()]).double()
            for row in rows.get(name, ()):
                counts[row] += own / copies
                span[row] = torch.maximum(span[row], extremes)
        if self._layout.world_size > 1:
            dist.all_reduce(counts)
            dist.all_reduce(span, op=dist.ReduceOp.MAX)
        return counts, span * span.new_tensor([-1, 1])


def _rows_of(sets: Mapping[str, Collection[str]]) -> dict[str, list[int]]:
    """Return the places of the sets in which each name is."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, names in enumerate(sets.values()):
        for name in names:
            rows[name].append(row)
    return rows


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def scale_gradients(params: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiply all gradients by ``factor`` in place."""
    grads = [local(p.grad) for p in params if p.grad is not None]
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_kind[grad.dtype, grad.device].append(grad)
    for (dtype, _), members in by_kind.items():
        torch._foreach_mul_(members, factor.to(dtype) if isinstance(factor, Tensor) else factor)


def clip_by_norm(params: Mapping[str, nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most ``max_norm``; no host synchronisation."""
    scale_gradients(params.values(), (max_norm / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def clip_by_value(params: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp every gradient element to ``[-limit, limit]``: elementwise, so right on any layout."""
    grads = [local(p.grad) for p in params if p.grad is not None]
    if grads:
        torch._foreach_clamp_min_(grads, -limit)
        torch._foreach_clamp_max_(grads, limit)
