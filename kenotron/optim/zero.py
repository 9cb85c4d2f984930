"""ZeRO 1 and 2: parameters are whole on every rank, and each rank updates its share of them.

One update of an optimizer, on all ranks of a group that hold the same parameters:

1. The closure has run: gradients are averaged. Each is whole; or this rank has only its part, where `GradientReducer` hands
   parts over, and the parameter has become its share already (`ShardedUpdate.place`): clipping and the like find both alike.
2. Each parameter that has a gradient becomes its share for a moment (``param.data`` and ``param.grad`` are views of this rank's
   rows), so that the user's own optimizer updates these rows, and keeps state for them alone.
3. ``Optimizer.step`` does its work.
4. Parameters are whole again, and the shares that the other ranks updated are gathered. Gradients are whole again too, or
   ``None`` where there were only parts.

Between updates a parameter is an ordinary ``nn.Parameter`` of its full shape, the same object throughout. An optimizer that
needs whole parameters gets whole ones: each is updated by one rank and sent to the others. One that is not known to treat
parameters one by one updates all of them on every rank, which is always right and saves nothing.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054, section 5.1.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kenotron.closures import with_closure
from kenotron.optim.placement import ShardAware, is_by_parameter, is_elementwise
from kenotron.parallel.buckets import Chunks, Rows, Scratch, Share, copy_all, fill, rows_of
from kenotron.parallel.collectives import start_all_gather

#: ``"rows"``: each rank updates some rows of each parameter. ``"parameters"``: some parameters. ``"none"``: all of them.
Granularity = Literal["rows", "parameters", "none"]


def granularity_of(optimizer: Optimizer) -> Granularity:
    """Return what the ranks can divide among them, of what an optimizer updates."""
    if isinstance(optimizer, ShardAware) or is_elementwise(type(optimizer)):
        return "rows"
    return "parameters" if is_by_parameter(type(optimizer)) else "none"


class ShardedUpdate:
    """Lets each rank update its share of an optimizer's parameters, in hooks around ``Optimizer.step``.

    All ranks of a group step together, with gradients for the same parameters.

    Args:
        optimizer: the user's. names: of its parameters by ``id``, the same on all ranks that hold them.
        group_of: a parameter -> the ranks that hold the same one, of which each updates a share.
        tied: names of parameters that other groups hold as well (pipeline stages), and divide alike.
        sizes: about how much of each parameter (by ``id``) a rank has, the same on all that update it together.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        group_of: Callable[[nn.Parameter], dist.ProcessGroup],
        tied: Collection[str] = (),
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        self.granularity = granularity_of(optimizer)
        self._optimizer, self._names, self._group_of, self._tied = optimizer, names, group_of, tied
        self._sizes = sizes or {}
        self._shares: dict[nn.Parameter, Share | None] = {}
        self._loads: dict[dist.ProcessGroup, list[int]] = {}  # elements that each rank updates, by whole parameters
        # Parameter and gradient, while shares are in their places.
        self._whole: dict[nn.Parameter, tuple[Tensor, Tensor | None]] = {}
        self._is_held = False
        self.scratch = Scratch()
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
        share = self.share(param)
        return None if share is None else share.own

    def updaters(self, param: nn.Parameter) -> list[int]:
        """Return the ranks of the group, as global ranks, that update any rows of a parameter."""
        share = self.share(param)
        if share is None:
            return []
        return [dist.get_global_rank(share.group, rank) for rank, rows in enumerate(share.rows) if rows.length]

    def share(self, param: nn.Parameter) -> Share | None:
        """Return what each rank updates of a parameter; ``None``: all of it."""
        if param not in self._shares:
            self._shares[param] = self._divide(param)
        return self._shares[param]

    def divided(self, param: nn.Parameter) -> Share | None:
        """Return what each rank updates of a parameter of the optimizer's; ``None``: all of it, or nothing."""
        is_updated = any(param is each for group in self._optimizer.param_groups for each in group["params"])
        return self.share(param) if is_updated else None

    def placed(self, param: nn.Parameter) -> Rows | None:
        """Return the rows that a parameter and its gradient are at the moment; ``None``: they are whole."""
        return self._own(param) if param in self._whole else None

    def _divide(self, param: nn.Parameter) -> Share | None:
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
            loads[owner] += self._size(param)
            rows = [Rows(0, size if rank == owner else 0) for rank in range(ranks)]
        return Share(group, tuple(rows), rows[dist.get_rank(group)], self.granularity == "parameters")

    def _size(self, param: nn.Parameter) -> int:
        """Return about how much of a parameter lies here: the same on tensor-parallel ranks, which divide alike."""
        return self._sizes.get(id(param), param.numel())

    @torch.no_grad()
    def take_shares(self) -> None:
        """Cut state that is there already, for whole parameters, to this rank's rows (it was loaded from elsewhere)."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        if self.granularity == "parameters":  # the largest first, to the least loaded
            params.sort(key=lambda param: -self._size(param))
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
        found = with_closure(args, kwargs, self._then_divide)
        if found is None:
            self._put_shares()
        return found

    def _then_divide(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def divided() -> Any:
            self.gather()  # a closure that is called again needs the whole of what was updated so far
            result = closure()
            self._put_shares()
            return result

        return divided

    @torch.no_grad()
    def place(self, parts: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Put shares in the places of parameters, with parts of averaged gradients in those of gradients.

        Args:
            parts: what this rank updates; ``None``: no rank has a gradient, and whoever waits for one finds the right shape.
        """
        for param, part in parts.items():
            self._put(param, self._own(param), part, None)

    @torch.no_grad()
    def _put_shares(self) -> None:
        """Before the update: put the shares of all parameters that have gradients in their places."""
        for param in [] if self._is_held else [param for param in self._whole if param.grad is None]:
            self._put_back(param)  # nobody updates these
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                rows = self.rows(param) if param.grad is not None else None
                if rows is None:
                    continue
                if param not in self._whole:
                    grad = param.grad
                    self._put(param, rows, rows.dense(grad), grad)
                # Rows that are none still have state, so that each rank knows of every parameter; a whole parameter is one
                # rank's business.
                if not rows.length and self.granularity == "parameters":
                    param.grad = None

    def _put(self, param: nn.Parameter, rows: Rows, part: Tensor | None, grad: Tensor | None) -> None:
        """Let a parameter be its share, with a part of a gradient; ``grad`` is there again when it is whole."""
        self._whole[param] = param.data, grad
        param.grad = None  # it must have the parameter's shape at any time
        param.data = rows.dense(param.data)
        if part is not None and part.stride() != param.stride():
            part = torch.empty_like(param).copy_(part)
        param.grad = part

    @torch.no_grad()
    def restore(self) -> list[nn.Parameter]:
        """Make parameters whole again, without what other ranks updated: as after an error. Returns those that were not."""
        restored = list(self._whole)
        for param in restored:
            self._put_back(param)
        return restored

    def _put_back(self, param: nn.Parameter) -> None:
        whole, grad = self._whole.pop(param)
        part, place = param.data, self._own(param).of(whole)
        param.grad = None
        param.data = whole
        param.grad = grad
        if part.numel() and part.data_ptr() != place.data_ptr():  # copied, or replaced by the optimizer
            place.copy_(part)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let several updates of some parameters each be one: shares stay in their places until the last one is done."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        self.gather()

    def _own(self, param: nn.Parameter) -> Rows:
        share = self._shares[param]
        assert share is not None
        return share.own

    @torch.no_grad()
    def gather(self) -> None:
        """Make parameters whole again, with what the other ranks have updated. All ranks call it."""
        if self._is_held:
            return
        params = self.restore()
        if not params:
            return
        travelling: list[_Bucket] = []  # two at a time: one travels while the one before is put where it belongs
        for bucket in self._buckets_of(params):
            bucket.launch()
            travelling.append(bucket)
            if len(travelling) == 2:
                travelling.pop(0).collect()
        for bucket in travelling:
            bucket.collect()

    def _buckets_of(self, params: Sequence[nn.Parameter]) -> list[_Bucket]:
        """Return what travels together of these parameters: nearly always the same ones."""
        key = tuple(map(id, params))
        if key not in self._buckets:
            self._buckets[key] = list(self._make_buckets(params))
        return self._buckets[key]

    def _make_buckets(self, params: Sequence[nn.Parameter]) -> Iterator[_Bucket]:
        def kind(param: nn.Parameter) -> tuple[Any, ...]:
            share = self._shares[param]
            assert share is not None
            return share.group, param.dtype, param.device

        for members in fill(params, kind):
            yield _Bucket(members, [share for param in members if (share := self._shares[param]) is not None], self.scratch)


class _Bucket:
    """Parameters of one dtype and group: each rank sends its rows of all of them in one piece, and gets everyone's."""

    def __init__(self, params: Sequence[nn.Parameter], shares: Sequence[Share], scratch: Scratch) -> None:
        self._params, self._rows = params, [share.own for share in shares]
        self._group, self._rank = shares[0].group, shares[0].group.rank()
        self._chunks = Chunks(params, shares, padded=not shares[0].is_whole)
        self._scratch = scratch
        self._works: list[dist.Work] = []
        self._memory: Tensor | None = None

    def launch(self) -> None:
        """Start to exchange rows."""
        lengths = self._chunks.lengths
        self._memory = self._scratch.take(self._params[0], sum(lengths))
        views = self._chunks.views(self._memory.split(lengths)[self._rank], self._rank)
        copy_all((view, rows.of(p.detach())) for view, rows, p in zip(views, self._rows, self._params, strict=True))
        self._works = start_all_gather(self._memory, lengths, self._group)

    def collect(self) -> None:
        """Put the other ranks' rows where they belong."""
        assert self._memory is not None
        for work in self._works:
            work.wait()
        pairs = self._chunks.pairs(self._memory, [param.detach() for param in self._params], without=self._rank)
        copy_all((place, piece) for piece, place in pairs)
        self._scratch.give(self._memory)
        self._works, self._memory = [], None
