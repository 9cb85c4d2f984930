"""Gradients of replicas are averaged while the backward pass still runs: whole ones, or only this rank's part of each.

Parameters are put into flat buckets in reverse order of registration, which is about the order in which their gradients appear.
One update, on all replicas:

1. `GradientReducer.arm` before a backward pass that reduces: its buckets are put in a fixed order, so that all ranks agree.
2. A bucket whose gradients are all there is sent at once, asynchronously. This rank's own gradients of the bucket before are
   freed, since they have been copied.
3. `close` after the pass sends what is left, with zeros where this rank has no gradient, and waits.
4. `finish`, after the last pass before the update, hands over the averages: whole ones as ``param.grad``, parts to the
   `Divider`. A parameter that no replica used in any pass has none.

Whole gradients are all-reduced in the last pass. Where the ranks divide the update among them and nobody looks at whole
gradients, they are reduce-scattered: in the last pass (ZeRO 1), or in every one (ZeRO 2), whose parts are summed, in float32 at
least.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kenotron.parallel.buckets import Chunks, Rows, Scratch, Share, copy_all, fill, laid_out_like
from kenotron.parallel.collectives import start_reduce_scatter

#: Buckets of parts that travel at once: the memory of those before is given back.
_MOST_TRAVELLING = 2


class Divider(Protocol):
    """Divides an update among ranks; ``scratch`` is for what travels."""

    scratch: Scratch

    def divided(self, param: nn.Parameter) -> Share | None:
        """Return who updates what of a parameter; ``None``: every rank all of it, or nobody."""

    def placed(self, param: nn.Parameter) -> Rows | None:
        """Return the rows that a parameter and its gradient are at the moment; ``None``: they are whole."""

    def place(self, parts: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Take over this rank's parts of averaged gradients; ``None``: no replica has one."""


class GradientReducer:
    """Averages gradients over the replicas.

    Args:
        params: what is replicated; those without ``requires_grad`` join when they are unfrozen.
        group: the replicas. copies: among them those which update the same share; ``None``: each updates one of its own.
        divisor: of their sum; ``None``: their number. Spread experts already sum over the ranks that send them tokens.
        stage_of: a parameter -> the one pipeline stage that uses it on this rank; ``None``: several do.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        divisor: int | None = None,
        *,
        copies: dist.ProcessGroup | None = None,
        stage_of: Callable[[nn.Parameter], int | None] = lambda _: 0,
    ) -> None:
        self.group, self.copies = group, copies
        self.divisor = divisor or dist.get_world_size(group)
        # The group's backend averages; otherwise it is done while gradients are copied.
        self._averages = dist.get_backend(group) == "nccl" and self.divisor == dist.get_world_size(group)
        self._stage_of = stage_of
        self._params = self._waiting = list(params)
        self._divider: Divider | None = None
        self._each_pass = False
        self._buckets: list[_Bucket] = []
        self._places: dict[nn.Parameter, tuple[_Bucket, int]] = {}
        self._hooked: set[int] = set()  # by id: they are all held here
        self._queue: list[_Bucket] = []
        self._launched = 0
        self._is_last = False  # the pass that runs, or ran, is the last one before the update
        self._take_in()

    def divide(self, divider: Divider | None, *, each_pass: bool = False) -> None:
        """From now on keep only this rank's parts of gradients, as ``divider`` says; ``None``: whole ones.

        Args:
            each_pass: reduce in every backward pass, not only in the last one before an update.
        """
        self._divider, self._each_pass = divider, each_pass
        self._buckets, self._places, self._queue, self._launched, self._is_last = [], {}, [], 0, False
        self._waiting = self._params

    def _take_in(self) -> None:
        """Make buckets for parameters that are trained and have none yet."""
        trained = [p for p in self._waiting if p.requires_grad]
        if not trained:
            return
        self._waiting = [p for p in self._waiting if not p.requires_grad]
        for param in trained:
            self._hook(param)
        shares = {param: self._divider.divided(param) if self._divider is not None else None for param in trained}

        def kind(param: nn.Parameter) -> tuple[object, ...]:
            return param.dtype, param.device, shares[param] is not None, self._stage_of(param)

        for members in fill(reversed(trained), kind):
            stage, divided = self._stage_of(members[0]), [s for p in members if (s := shares[p]) is not None]
            bucket: _Bucket = _Whole(members, stage)
            if divided and self._divider is not None:
                bucket = _Parts(members, stage, divided, self._divider.scratch, each_pass=self._each_pass and stage is not None)
            self._buckets.append(bucket)
            self._places.update({param: (bucket, index) for index, param in enumerate(members)})

    def _hook(self, param: nn.Parameter) -> None:
        if id(param) in self._hooked:
            return
        self._hooked.add(id(param))
        # Python's collector does not see through hooks of C++: with itself in them, neither this object, nor the model, nor the
        # connections of the group would ever go.
        reducer = weakref.ref(self)

        def ready(param: nn.Parameter) -> None:
            if (alive := reducer()) is not None:
                alive._ready(param)

        param.register_post_accumulate_grad_hook(ready)

    def arm(self, stage: int | None, *, last: bool) -> None:
        """Let the backward pass that comes reduce what it is to reduce; other gradients only accumulate.

        Args:
            stage: the pipeline stage whose pass it is. last: it is the last one on this rank before an update.
        """
        self.close()
        self._take_in()
        queue = [b for b in self._buckets if (b.stage == stage if b.each_pass else last)]
        complete = [b for b in queue if last and b.stage not in (None, stage)]  # other stages have had their last pass
        self._queue = [*complete, *(b for b in queue if b not in complete)]
        self._launched, self._is_last = 0, last
        for bucket in complete:
            bucket.ready = set(range(len(bucket.params)))
        self._launch_ready()

    def _ready(self, param: nn.Parameter) -> None:
        found = self._places.get(param)
        if found is None or not self._queue or found[0] not in self._queue:
            return
        bucket, index = found
        if bucket.is_sent:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} got a gradient twice in one backward pass, the second one after it "
                "was sent to the other ranks. Reentrant checkpointing of a shared weight does so: set use_reentrant=False."
            )
        bucket.ready.add(index)
        self._launch_ready()

    def _launch_ready(self) -> None:
        while self._launched < len(self._queue) and self._queue[self._launched].is_ready:
            self._launch()

    def _launch(self) -> None:
        at = self._launched
        self._queue[at].launch(self.group, self.divisor, self._averages)
        self._queue[at].is_sent = True
        if at:  # not those of this one: hooks of the user's may look at them now
            self._queue[at - 1].free_gradients()
        if at >= _MOST_TRAVELLING and isinstance(self._queue[at - _MOST_TRAVELLING], _Parts):
            self._queue[at - _MOST_TRAVELLING].collect()
        self._launched += 1

    def close(self) -> None:
        """Send what is left of the pass that ran, and wait for it."""
        while self._launched < len(self._queue):
            self._launch()
        for bucket in self._queue[-1:]:
            bucket.free_gradients()
        for bucket in self._queue:
            bucket.collect()
            bucket.ready.clear()
            bucket.is_sent = False
        self._queue, self._launched = [], 0

    def finish(self) -> None:
        """Reduce what is not reduced yet, and hand over the averages."""
        if not self._is_last:  # the last pass had nothing to differentiate
            self.arm(None, last=True)
        self.close()
        self._is_last = False
        parts = [bucket for bucket in self._buckets if isinstance(bucket, _Parts)]
        if self.copies is not None and parts:
            works = [bucket.sum_copies(self.copies, self._averages) for bucket in parts]
            for work in works:
                work.wait()
        for bucket in self._buckets:
            if isinstance(bucket, _Whole):
                bucket.hand_over()
        if self._divider is not None and parts:
            self._divider.place({param: part for bucket in parts for param, part in bucket.take()})


class _Bucket:
    """Parameters of one dtype and device whose gradients travel together, and a flag for each: does it have one?"""

    each_pass = False

    def __init__(self, params: Sequence[nn.Parameter], stage: int | None) -> None:
        self.params, self.stage = list(params), stage
        self.ready: set[int] = set()
        self.is_sent = False
        self._had = [False] * len(self.params)  # a gradient on this rank

    @property
    def is_ready(self) -> bool:
        return len(self.ready) == len(self.params)

    def launch(self, group: dist.ProcessGroup, divisor: int, averages: bool) -> None:
        """Start to average; ``averages``: the group's backend does so."""
        raise NotImplementedError

    def collect(self) -> None:
        """Wait for it, if it travels."""
        raise NotImplementedError

    def free_gradients(self) -> None:
        """Let go of this rank's own gradients, which have been copied."""
        for param in self.params:
            param.grad = None

    def _fill(self, pairs: Iterable[tuple[Tensor, Tensor]], factor: float | None) -> None:
        """Copy gradients into flat memory, ``factor`` times."""
        if factor is None:
            copy_all(pairs)
            return
        for target, source in pairs:
            torch.mul(source, factor, out=target)

    def _gradients(self) -> list[Tensor | None]:
        grads = [param.grad for param in self.params]
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None and grad.layout != torch.strided:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} has a gradient of layout {grad.layout}, and gradients "
                    "are averaged dense. Set sparse=False where the module is made (nn.Embedding, nn.EmbeddingBag)."
                )
        return grads


class _Whole(_Bucket):
    """Gradients that are all-reduced. The memory in which they travel is that of the averages, and is freed with them."""

    def __init__(self, params: Sequence[nn.Parameter], stage: int | None) -> None:
        super().__init__(params, stage)
        self._memory: Tensor | None = None
        self._work: dist.Work | None = None

    def _views(self, memory: Tensor) -> list[Tensor]:
        parts = memory[: -len(self.params)].split([param.numel() for param in self.params])
        return [laid_out_like(param, part) for part, param in zip(parts, self.params, strict=True)]

    @torch.no_grad()
    def launch(self, group: dist.ProcessGroup, divisor: int, averages: bool) -> None:
        grads, numel = self._gradients(), sum(param.numel() for param in self.params)
        self._memory = memory = self.params[0].new_empty(numel + len(self.params), requires_grad=False)
        self._had = [grad is not None for grad in grads]
        pairs = []
        for view, grad in zip(self._views(memory), grads, strict=True):
            if grad is None:
                view.zero_()
            else:
                pairs.append((view, grad))
        self._fill(pairs, None if averages else 1 / divisor)
        _flag(memory[numel:], self._had)
        operation = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
        self._work = dist.all_reduce(memory, operation, group=group, async_op=True)

    def collect(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None

    def hand_over(self) -> None:
        """Give parameters the averaged gradients."""
        assert self._memory is not None
        flags = self._memory[-len(self.params) :]
        for index, (param, view) in enumerate(zip(self.params, self._views(self._memory), strict=True)):
            # A parameter that no replica used keeps no gradient; the flag is read only where this rank has none.
            param.grad = view if self._had[index] or flags[index] != 0 else None
        self._memory = None


class _Parts(_Bucket):
    """Gradients that are reduce-scattered: this rank gets the sum of its rows, which are kept until the update."""

    def __init__(
        self, params: Sequence[nn.Parameter], stage: int | None, shares: Sequence[Share], scratch: Scratch, *, each_pass: bool
    ) -> None:
        super().__init__(params, stage)
        self.each_pass = each_pass
        self._group, self._scratch = shares[0].group, scratch
        self._chunks = Chunks(params, shares, extra=len(params), padded=not shares[0].is_whole)
        dtype = params[0].dtype
        self._sum_dtype = torch.promote_types(dtype, torch.float32) if each_pass else dtype
        self._memory: Tensor | None = None
        self._sum: Tensor | None = None
        self._collect: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def launch(self, group: dist.ProcessGroup, divisor: int, averages: bool) -> None:
        grads = self._gradients()
        self._memory = memory = self._scratch.take(self.params[0], sum(self._chunks.lengths))
        had = [grad is not None for grad in grads]
        if not all(had):
            memory.zero_()
        self._fill(self._chunks.pairs(memory, grads), None if averages else 1 / divisor)
        for flags in self._chunks.extras(memory):
            _flag(flags, had)
        self._had = [before or now for before, now in zip(self._had, had, strict=True)]
        self._collect = start_reduce_scatter(memory, self._chunks.lengths, self._group, self._sum_dtype, averages=averages)

    @torch.no_grad()
    def collect(self) -> None:
        if self._collect is not None:
            found = self._collect()
            self._sum = found if self._sum is None else self._sum.add_(found)
            assert self._memory is not None
            self._scratch.give(self._memory)
        self._collect = self._memory = None

    def sum_copies(self, copies: dist.ProcessGroup, averages: bool) -> dist.Work:
        """Start to sum over the ranks that update the same share."""
        assert self._sum is not None
        work: dist.Work = dist.all_reduce(
            self._sum, dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM, group=copies, async_op=True
        )
        return work

    def take(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Return this rank's part of each average, and forget them."""
        assert self._sum is not None
        rank = self._group.rank()
        total = self._sum.to(self.params[0].dtype)
        flags = total[len(total) - len(self.params) :]
        found = [
            (param, view if self._had[index] or flags[index] != 0 else None)
            for index, (param, view) in enumerate(zip(self.params, self._chunks.views(total, rank), strict=True))
        ]
        self._sum, self._had = None, [False] * len(self.params)
        return found


def _flag(flags: Tensor, had: Sequence[bool]) -> None:
    flags.fill_(1)
    for index, each in enumerate(had):
        if not each:
            flags[index] = 0
