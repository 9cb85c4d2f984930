"""The user's optimizers on several ranks: which parameters they have, what each rank updates, where their state lies."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kenotron.optim.offload import HostState
from kenotron.optim.placement import Placement, ShardAware, check_optimizer
from kenotron.optim.zero import ShardedUpdate
from kenotron.parallel.apply import share_groups
from kenotron.strategies import _lightning
from kenotron.strategies.base import StrategyBase
from kenotron.strategies.checks import adopt_optimizer
from kenotron.strategies.gradients import who_looks
from kenotron.strategies.guard import Guard, StepGuard, check_precision_of_guard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class OptimizerSetup(StrategyBase):
    """Prepares what ``configure_optimizers`` returns."""

    _expert_mesh: DeviceMesh | None
    _guard: Guard | None
    _offload_optimizer: bool
    _offloaded: list[HostState]

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        assert self._done is not None
        if self._guard is not None:
            check_precision_of_guard(str(self.precision_plugin.precision))
            self._guards = {id(each): StepGuard(self._guard, each, self.root_device) for each in self.optimizers}
        for optimizer in self.optimizers:
            adopt_optimizer(optimizer, self._done, self.world_size)
            check_optimizer(optimizer, self.layout)
        self._updates = self._shard_updates()
        for optimizer, update in zip(self.optimizers, self._updates or itertools.repeat(None), strict=False):
            if isinstance(optimizer, ShardAware):
                optimizer.bind(Placement.of(self._done, self._mesh, update.rows if update else lambda _: None))
            mixed = {isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"] if p.numel()}
            if len(mixed) > 1:  # scalars are not sharded: no single multi-tensor kernel takes both kinds
                for group in optimizer.param_groups:
                    group["foreach"] = False
        if self._offload_optimizer:
            self._offloaded = []
            sizes = self._done.sizes_alike()
            for index, optimizer in enumerate(self.optimizers):
                held = self._updates[index].held if self._updates else contextlib.nullcontext
                self._offloaded.append(HostState(optimizer, sizes, held=held))

    def _shard_updates(self) -> list[ShardedUpdate]:
        """ZeRO 1 and 2: let each data-parallel rank update its share."""
        assert self._done is not None
        self._done.divide_gradients(None)
        if self._mesh is None or self.layout.zero_stage not in (1, 2) or self.layout.dp_shard * self.layout.cp == 1:
            return []
        updates = []
        for optimizer in self.optimizers:
            update = ShardedUpdate(optimizer, self._done.names(), share_groups(self._done, self._mesh, self._expert_mesh),
                                   tied=self._done.shards.holders, sizes=self._done.sizes_alike())  # fmt: skip
            if update.granularity == "none" and self.is_global_zero:
                kind = type(optimizer).__name__
                _lightning.warn(
                    self.names,
                    f"{kind} is not known to treat parameters one by one: every rank updates all of them and holds all of its "
                    f"state. If it does, set {kind}.is_by_parameter = True; if each element of its update depends on the same "
                    f"element of gradient and state alone, set {kind}.is_elementwise = True.",
                )
            updates.append(update)
        return updates

    def on_train_start(self) -> None:
        if self._mesh is not None:
            self._choose_gradients()

    def _choose_gradients(self) -> None:
        """Let each rank keep its parts of gradients alone, where it updates nothing else and nobody looks at whole ones."""
        assert self._done is not None and self._mesh is not None
        update = next((each for each in self._updates if each.granularity != "none"), None)
        if update is None:
            return
        trainer, stage = self._user_module.trainer, self.layout.zero_stage
        who = who_looks(self._user_module, trainer.callbacks, self.precision_plugin)
        found = torch.tensor(float(who is not None), device=self.root_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)  # ranks may have other callbacks
        looked_at = bool(found)
        self._done.divide_gradients(None if looked_at else update, each_pass=stage == 2)
        if not looked_at:
            _lightning.say(self.names, "each process keeps its part of gradients; param.grad is None after an update.")
            return
        text = f"gradients are whole in every process, since {who or 'a callback of another process'} may look at them."
        if stage == 2:
            _lightning.warn(self.names, f"zero_stage=2: {text} They take as much memory as with zero_stage=1.")
        else:
            _lightning.say(self.names, text)
