"""Parameters while FSDP2 has them gathered, so that a step may do with them what it does in one process.

1. gather: the copies carry the attributes and gradient hooks of the parameters, see ``shards.take_over``.
2. step: user code may change them (a momentum encoder, weights that are clipped).
3. release: this rank's part of each copy goes back into its shard.
4. backward: parameters that this rank did not use have gradients of zeros, as other ranks may have used them; what none has
   used keeps no gradient (`finish`).

All ranks must gather the same modules in the same order: FSDP2 pairs collectives by order alone, and weights of one module
would end up in another. In the first steps names are compared before each gather, through the job's store; later the sum of
a step's names, at its end. Where a rank waits for long, its monitor's thread tells the others what it has gathered in this
step, and finds where they part (`CollectiveNames`).
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kenotron.devices import to_host
from kenotron.parallel._torch import default_store, fsdp_groups, storage_id
from kenotron.parallel.shards import attributes, canonical, hand_on_hooks

_COMPARED_STEPS = 3
_COMPARED_CALLS = 64  # where nothing is trained
_PATIENCE_S = 15.0  # with a rank that is slow or gone: the collective itself waits, or fails
_STUCK_S = 5.0
_END = "nothing more in this step"
_UNLIKE = (
    "Under zero_stage=3 every rank must run the same layers in the same order, since each has a part of all of them: "
    "FSDP would mix their weights. Let all ranks run all layers (on samples of zeros whose loss counts 0), or set zero_stage=2."
)

_instances = itertools.count()


class CollectiveNames:
    """What this rank has gathered and reduced in this step, which others compare where all wait.

    The step path appends to a list. Only where it has not done so for `_STUCK_S`, another thread puts the list into the store.
    """

    def __init__(self, ranks: list[int], name: str) -> None:
        self._ranks, self._name = ranks, name
        self._lock = threading.Lock()
        self._round = 0
        self._names: list[str] = []
        self._moved = time.monotonic()
        self._told: tuple[int, int] | None = None

    def add(self, name: str) -> None:
        """Note what this rank is about to wait for."""
        with self._lock:
            self._names.append(name)
            self._moved = time.monotonic()

    def restart(self) -> None:
        """All ranks have come to the same place: a step's end."""
        with self._lock:
            self._round += 1
            self._names = []

    def who_parted(self, store: dist.Store) -> tuple[int, str] | None:
        """Return a rank that waits for something else than this one, and what to say of it; from any thread."""
        with self._lock:
            current, names, waited_s = self._round, list(self._names), time.monotonic() - self._moved
        if not names or waited_s < _STUCK_S:
            return None
        own = dist.get_rank()
        key = f"waits/{self._name}/{current}"
        if self._told != (current, len(names)):
            store.set(f"{key}/{own}", json.dumps(names))
            self._told = (current, len(names))
        for rank in self._ranks:
            if rank == own or not store.check([f"{key}/{rank}"]):
                continue
            for mine, other in zip(names, json.loads(store.get(f"{key}/{rank}")), strict=False):
                if mine != other:
                    return rank, f"is at {other!r} where rank {own} is at {mine!r}. {_UNLIKE}"
        return None


class GatheredParameters:
    """Watches over the copies of one module's parameters.

    Args:
        root: after ``fully_shard``. group: the ranks over which gradients are averaged.
        same_dtype: copies have the dtype of their shards.
    """

    def __init__(self, root: nn.Module, group: dist.ProcessGroup, *, same_dtype: bool) -> None:
        self._group = group
        self._same_dtype = same_dtype
        self._groups = fsdp_groups(root)
        instance = next(_instances)
        self._store = dist.PrefixStore(f"kenotron/gathers/{instance}", default_store())
        self.names = CollectiveNames(dist.get_process_group_ranks(group), f"{instance}")
        self.has_failed: Callable[[], bool] = lambda: False  # whether another rank has
        modules = {id(module): canonical(name) for name, module in root.named_modules()}
        self._names: dict[int, str] = {}
        self._params: list[Any] = []
        for each in self._groups:
            name = modules[id(each.modules[0])] or type(root).__name__
            for param in each.fsdp_params:
                info = param._module_info
                self._names[id(param)] = f"{modules[id(info.module)]}.{info.param_name}".removeprefix(".")
                self._params.append(param)
            self._watch(each, name)
        self._copies: dict[int, Tensor] = {}
        self._storages: dict[int, tuple[nn.Parameter, int]] = {}
        self._used: set[int] = set()  # had a gradient here since the last update
        self._filled: set[int] = set()  # got zeros, and had no gradient before
        self._order = 0
        self._unread: tuple[Tensor, torch.cuda.Event | None] | None = None  # what the last step's names came to
        self._compared, self._calls, self._position = 0, 0, 0

    def _watch(self, group: Any, name: str) -> None:
        """Put a word in before what a group of parameters does."""
        unshard, to_unsharded, to_sharded = group.unshard, group._to_unsharded, group._to_sharded
        pre_backward, post_backward = group.pre_backward, group.post_backward

        def gather(*args: Any, **kwargs: Any) -> Any:
            if group.is_sharded and group._all_gather_result is None:
                self._note(name)
                self._compare(name)
            return unshard(*args, **kwargs)

        def gathered() -> None:
            to_unsharded()
            for param in group.fsdp_params:
                self._prepare(param)

        def release() -> None:
            if group.is_unsharded:
                for param in group.fsdp_params:
                    self._write_back(param)
            to_sharded()

        def enter_backward(*args: Any) -> None:
            if torch.is_grad_enabled():  # only where the backward pass is itself recorded
                raise ValueError(
                    "second derivatives (torch.autograd.grad(..., create_graph=True), gradient penalties) do not go through "
                    "parameters that are gathered and freed. Set zero_stage to 2 or less."
                )
            pre_backward(*args)

        def reduce(*args: Any) -> None:
            if group.reduce_grads:
                self.names.add(f"gradients of {name}")
                for param in group.fsdp_params:
                    self._fill(param)
            post_backward(*args)

        group.unshard, group._to_unsharded, group._to_sharded = gather, gathered, release
        group.pre_backward, group.post_backward = enter_backward, reduce

    # ------------------------------------------------------------------------------------------- gathered and released

    def _prepare(self, param: Any) -> None:
        copy, shard = param._unsharded_param, param.sharded_param
        if self._copies.get(id(param)) is not copy:
            self._copies[id(param)] = copy
            copy.__dict__.update(attributes(shard))
            hand_on_hooks(shard, copy)

    @torch.no_grad()
    def _write_back(self, param: Any) -> None:
        """Let the shard have this rank's part of the copy, which the step may have changed (also through ``.data``)."""
        copy, whole, shard = param._unsharded_param, param.all_gather_outputs[0], param._sharded_param_data
        if copy.shape != param._orig_size:
            raise ValueError(
                f"the step gave {self._names[id(param)]} another shape ({tuple(copy.shape)} in place of "
                f"{tuple(param._orig_size)}). Under zero_stage=3 parameters keep theirs."
            )
        if copy.data_ptr() != whole.data_ptr() and copy.numel():  # by `param.data = …`
            home = torch.as_strided(whole, copy.shape, param._contiguous_orig_stride, storage_offset=0)
            home.copy_(copy)
            copy.data = home
        mine = whole.narrow(0, param.mesh_info.shard_mesh_rank * shard.numel(), shard.numel())
        if not self._same_dtype:  # the copy has less precision: what did not change stays
            torch.where(mine == shard.to(mine.dtype), shard, mine.to(shard.dtype), out=shard)
        elif shard.device.type != "cpu" or not torch.equal(mine, shard):
            shard.copy_(mine)

    def check_assigned(self) -> None:
        """Raise ``ValueError`` for a sharded parameter that was assigned to through ``.data``, which reaches no shard."""
        for param in self._params:
            shard = param.sharded_param
            known = self._storages.get(id(param))
            if known is None or known[0] is not shard:
                self._storages[id(param)] = (shard, storage_id(shard))
            elif known[1] != storage_id(shard):
                name = self._names[id(param)]
                raise ValueError(
                    f"{name}.data = … was set between steps, where each rank has a part of {name} (zero_stage=3), and it would "
                    f"be lost. Write into it (with torch.no_grad(): {name}.copy_(…), .mul_(…)), or assign within training_step."
                )

    # ------------------------------------------------------------------------------------------------------ gradients

    def _fill(self, param: Any) -> None:
        """Give a parameter without a gradient one of zeros, where this pass has gathered it."""
        copy = getattr(param, "_unsharded_param", None)
        if copy is None or not copy.requires_grad:
            return
        if copy.grad is not None or param.unsharded_accumulated_grad is not None:
            self._used.add(id(param))
            return
        if param.sharded_param.grad is None:
            self._filled.add(id(param))
        copy.grad = torch.zeros(param._orig_size, dtype=copy.dtype, device=copy.device)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward pass before an update: what no rank has used gets no gradient; compare the step's names.

        Raises:
            ValueError: ranks have gathered different modules.
        """
        self.names.add(_END)
        self._compare(_END)
        if not self._params:
            return
        device = self._params[0].device
        numbers = [float(id(param) in self._used) for param in self._params] + [self._order, -self._order]
        found = torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        if self._unread is not None:
            late, ready = self._unread
            if ready is not None:
                ready.synchronize()
            _check_order(*late.tolist())
            self._unread = None
        if self._filled or self._compared < _COMPARED_STEPS or device.type == "cpu":
            *used, high, low = found.tolist()
            _check_order(high, low)
            for param, was_used in zip(self._params, used, strict=True):
                if id(param) in self._filled and not was_used:
                    param.sharded_param.grad = None
        else:  # read a step later: nothing waits for the device
            self._unread = to_host(found[-2:])
        self.names.restart()
        self._used.clear()
        self._filled.clear()
        self._order = 0
        self._compared += 1

    # ---------------------------------------------------------------------------------------------------------- order

    def begin(self) -> None:
        """A step is about to run."""
        self.check_assigned()
        self._calls += 1
        if not torch.is_grad_enabled():  # no update will follow
            self.names.restart()

    def _note(self, name: str) -> None:
        self._order = zlib.crc32(name.encode(), self._order)
        self.names.add(name)

    def _compare(self, name: str) -> None:
        """In the first steps: raise ``ValueError`` where another rank is about to gather another module."""
        ranks = dist.get_process_group_ranks(self._group)
        if self._compared >= _COMPARED_STEPS or self._calls > _COMPARED_CALLS or len(ranks) == 1:
            return
        own = dist.get_rank()
        self._position += 1
        self._store.set(f"{self._position}/{own}", name)
        for rank in ranks[1:] if own == ranks[0] else ranks[:1]:
            other = self._name_on(rank)
            if other is None:
                self._compared = _COMPARED_STEPS
                return
            if other != name:
                raise ValueError(f"rank {own} runs {name!r} where rank {rank} runs {other!r}. {_UNLIKE}")

    def _name_on(self, rank: int) -> str | None:
        """Return what a rank gathers at this position; ``None`` if it does not say so in time."""
        key, deadline = f"{self._position}/{rank}", time.monotonic() + _PATIENCE_S
        while not self._store.check([key]):
            if self.has_failed() or time.monotonic() > deadline:
                return None
            time.sleep(0.001)
        return self._store.get(key).decode()


def _check_order(high: float, low: float) -> None:
    """Raise ``ValueError`` where the highest and the (negated) lowest sum of the ranks' names are not the same."""
    if high != -low:
        raise ValueError(_UNLIKE)
