"""ZeRO 1: parameters and gradients are whole on every rank, and each rank updates its share of them.

One update of an optimizer, on all ranks of a group that hold the same parameters:

1. The closure has run: gradients are whole, averaged, and clipped.
2. Each parameter that has a gradient becomes its share for a moment (``param.data`` and ``param.grad`` are views of this rank's
   rows), so that the user's own optimizer updates these rows, and keeps state for them alone.
3. ``Optimizer.step`` does its work.
4. Parameters are whole again, and the shares that the other ranks updated are gathered.

Between updates a parameter is an ordinary ``nn.Parameter`` of its full shape, the same object throughout. An optimizer that
needs whole parameters gets whole ones: each is updated by one rank and sent to the others. One that is not known to treat
parameters one by one updates all of them on every rank, which is always right and saves nothing.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054, section 5.1.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kenotron.optim.placement import ShardAware, is_by_parameter, is_elementwise
from kenotron.parallel.collectives import all_gather_single

#: ``"rows"``: each rank updates some rows of each parameter. ``"parameters"``: some parameters. ``"none"``: all of them.
Granularity = Literal["rows", "parameters", "none"]

#: Bytes of updated parameters that travel together.
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


def granularity_of(optimizer: Optimizer) -> Granularity:
    """Return what the ranks can divide among them, of what an optimizer updates."""
    if isinstance(optimizer, ShardAware) or is_elementwise(type(optimizer)):
        return "rows"
    return "parameters" if is_by_parameter(type(optimizer)) else "none"


def rows_of(size: int, ranks: int, offset: int) -> list[Rows]:
    """Divide ``size`` rows among ranks as evenly as rows allow: of each rank in order.

    Args:
        offset: which rank begins. Parameters with other offsets leave their remainders to other ranks.
    """
    bounds = [size * part // ranks for part in range(ranks + 1)]
    parts = [Rows(start, end - start) for start, end in itertools.pairwise(bounds)]
    return [parts[(rank + offset) % ranks] for rank in range(ranks)]


class _Share(NamedTuple):
    """What each rank of a group updates of a parameter."""

    group: dist.ProcessGroup
    rows: tuple[Rows, ...]
    own: Rows


class ShardedUpdate:
    """Lets each rank update its share of an optimizer's parameters, in hooks around ``Optimizer.step``.

    All ranks of a group step together, with gradients for the same parameters.

    Args:
        optimizer: the user's. names: of its parameters by ``id``, the same on all ranks that hold them.
        group_of: a parameter -> the ranks that hold the same one, of which each updates a share.
        tied: names of parameters that other groups hold as well (pipeline stages), and divide alike.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        group_of: Callable[[nn.Parameter], dist.ProcessGroup],
        tied: Collection[str] = (),
    ) -> None:
        self.granularity = granularity_of(optimizer)
        self._optimizer, self._names, self._group_of, self._tied = optimizer, names, group_of, tied
        self._shares: dict[nn.Parameter, _Share | None] = {}
        self._loads: dict[dist.ProcessGroup, list[int]] = {}  # elements that each rank updates, by whole parameters
        self._whole: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}  # parameter and gradient, while shares are in their places
        self._buckets: dict[tuple[int, ...], list[_Bucket]] = {}
        self._handles: list[Any] = []
        if self.granularity != "none":
            self._handles = [
                optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(lambda *_: self.gather())
            ]  # fmt: skip
            self.take_shares()

    def remove(self) -> None:
        """Step aside: from now on the optimizer updates whatever it is given."""
        for handle in self._handles:
            handle.remove()

    # ------------------------------------------------------------------------------------------------------------ shares

    def rows(self, param: nn.Parameter) -> Rows | None:
        """Return the rows of a parameter that this rank updates; ``None``: all of them, as on every other rank."""
        share = self._share(param)
        return None if share is None else share.own

    def updaters(self, param: nn.Parameter) -> list[int]:
        """Return the ranks of the group, as global ranks, that update any rows of a parameter."""
        share = self._share(param)
        if share is None:
            return []
        return [dist.get_global_rank(share.group, rank) for rank, rows in enumerate(share.rows) if rows.length]

    def _share(self, param: nn.Parameter) -> _Share | None:
        if param not in self._shares:
            self._shares[param] = self._divide(param)
        return self._shares[param]

    def _divide(self, param: nn.Parameter) -> _Share | None:
        """Decide who updates what of a parameter: every rank comes to the same, without asking."""
        if self.granularity == "none" or param.ndim == 0 or not param.numel() or id(param) not in self._names:
            return None  # a scalar is no work; what is empty belongs to another pipeline stage
        group, name = self._group_of(param), self._names[id(param)]
        ranks, size = group.size(), param.shape[0]
        if ranks == 1:
            return None
        by_name = zlib.crc32(name.encode()) % ranks  # alike on tensor-parallel ranks, and on stages that share a weight
        if self.granularity == "rows":
            rows = rows_of(size, ranks, by_name)
        else:
            loads = self._loads.setdefault(group, [0] * ranks)
            owner = by_name if name in self._tied else loads.index(min(loads))
            loads[owner] += param.numel()
            rows = [Rows(0, size if rank == owner else 0) for rank in range(ranks)]
        return _Share(group, tuple(rows), rows[dist.get_rank(group)])

    @torch.no_grad()
    def take_shares(self) -> None:
        """Cut state that is there already, for whole parameters, to this rank's rows (it was loaded from elsewhere)."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        if self.granularity == "parameters":  # the largest first, to the least loaded
            params.sort(key=lambda param: -param.numel())
        for param in params:
            rows = self.rows(param)
            if rows is None or param not in self._optimizer.state:
                continue
            state = self._optimizer.state[param]
            if self.granularity == "parameters":
                if not rows.length:
                    del self._optimizer.state[param]
                continue
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    state[key] = rows.of(value).clone()

    # ----------------------------------------------------------------------------------------------------------- updates

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Before ``Optimizer.step``, whose closure runs the module: shares take their places when it returns."""
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._then_divide(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer itself
            return (args[0], self._then_divide(args[1]), *args[2:]), kwargs
        self._put_shares()
        return None

    def _then_divide(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def divided() -> Any:
            self.gather()  # a closure that is called again needs the whole of what was updated so far
            result = closure()
            self._put_shares()
            return result

        return divided

    @torch.no_grad()
    def _put_shares(self) -> None:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                rows = self.rows(param) if param.grad is not None else None
                if rows is None:
                    continue
                whole, grad = param.data, param.grad
                self._whole[param] = whole, grad
                param.grad = None  # it must have the parameter's shape at any time
                param.data = rows.dense(whole)
                # Rows that are none still have state, so that each rank knows of every parameter; a whole parameter is one
                # rank's business.
                if rows.length or self.granularity == "rows":
                    param.grad = rows.dense(grad)

    @torch.no_grad()
    def restore(self) -> list[nn.Parameter]:
        """Make parameters whole again, without what other ranks updated: as after an error. Returns those that were not."""
        restored = list(self._whole)
        for param, (whole, grad) in self._whole.items():
            part, place = param.data, self._own(param).of(whole)
            param.grad = None
            param.data = whole
            param.grad = grad
            if part.numel() and part.data_ptr() != place.data_ptr():  # copied, or replaced by the optimizer
                place.copy_(part)
        self._whole.clear()
        return restored

    def _own(self, param: nn.Parameter) -> Rows:
        share = self._shares[param]
        assert share is not None
        return share.own

    @torch.no_grad()
    def gather(self) -> None:
        """Make parameters whole again, with what the other ranks have updated. All ranks call it."""
        params = self.restore()
        if not params:
            return
        if self.granularity == "parameters":
            self._send_whole(params)
            return
        travelling: list[_Bucket] = []  # two at a time: one travels while the one before is put where it belongs
        for bucket in self._buckets_of(params):
            bucket.launch()
            travelling.append(bucket)
            if len(travelling) == 2:
                travelling.pop(0).collect()
        for bucket in travelling:
            bucket.collect()

    def _send_whole(self, params: Sequence[nn.Parameter]) -> None:
        """Send each parameter from the rank that updated it."""
        sent: list[tuple[nn.Parameter, Tensor, dist.Work | None]] = []
        for param in params:
            share = self._shares[param]
            assert share is not None
            flat = param.detach().contiguous()
            work = dist.broadcast(flat, self.updaters(param)[0], group=share.group, async_op=True)
            sent.append((param, flat, work))
        for param, flat, work in sent:
            assert work is not None
            work.wait()
            if flat.data_ptr() != param.data_ptr():
                param.copy_(flat)

    def _buckets_of(self, params: Sequence[nn.Parameter]) -> list[_Bucket]:
        """Return what travels together of these parameters: nearly always the same ones."""
        key = tuple(map(id, params))
        if key not in self._buckets:
            self._buckets[key] = list(self._make_buckets(params))
        return self._buckets[key]

    def _make_buckets(self, params: Sequence[nn.Parameter]) -> Iterator[_Bucket]:
        kinds: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for param in params:
            share = self._shares[param]
            assert share is not None
            kinds.setdefault((share.group, param.dtype, param.device), []).append(param)
        for (group, *_), members in kinds.items():
            bucket: list[nn.Parameter] = []
            size = 0
            for param in members:
                if bucket and size + param.nbytes > BUCKET_BYTES:
                    yield _Bucket(bucket, self._shares, group)
                    bucket, size = [], 0
                bucket.append(param)
                size += param.nbytes
            yield _Bucket(bucket, self._shares, group)


class _Bucket:
    """Parameters of one dtype and group: each rank sends its rows of all of them in one piece, and gets everyone's."""

    def __init__(
        self, params: Sequence[nn.Parameter], shares: Mapping[nn.Parameter, _Share | None], group: dist.ProcessGroup
    ) -> None:
        self._group, self._rank = group, dist.get_rank(group)
        # (parameter, its rows) of each rank.
        self._parts: list[list[tuple[nn.Parameter, Rows]]] = [[] for _ in range(group.size())]
        for param in params:
            share = shares[param]
            assert share is not None
            for rank, rows in enumerate(share.rows):
                if rows.length:
                    self._parts[rank].append((param, rows))
        self._numel = max(sum(rows.length * math.prod(p.shape[1:]) for p, rows in part) for part in self._parts)
        self._like = params[0]
        self._work: dist.Work | None = None
        self._received: Tensor | None = None

    def launch(self) -> None:
        """Start to exchange rows."""
        own = self._like.new_empty(self._numel, requires_grad=False)
        self._copy(own, self._rank, outwards=True)
        self._received = own.new_empty(self._numel * self._group.size())
        self._work = all_gather_single(self._received, own, group=self._group, async_op=True)

    def collect(self) -> None:
        """Put the other ranks' rows where they belong."""
        assert self._work is not None and self._received is not None
        self._work.wait()
        for rank, piece in enumerate(self._received.split(self._numel)):
            if rank != self._rank:
                self._copy(piece, rank, outwards=False)
        self._work = self._received = None

    def _copy(self, flat: Tensor, rank: int, *, outwards: bool) -> None:
        places = [rows.of(param.detach()) for param, rows in self._parts[rank]]
        if not places:
            return
        sizes = [place.numel() for place in places]
        parts = [part.view(p.shape) for part, p in zip(flat[: sum(sizes)].split(sizes), places, strict=True)]
        torch._foreach_copy_(*((parts, places) if outwards else (places, parts)))
