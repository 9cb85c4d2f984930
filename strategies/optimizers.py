"""The user's optimizers on several ranks: which parameters they have, what each rank updates, where their state lies."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from kenotron.optim.offload import HostState
from kenotron.optim.placement import Placement, ShardAware, check_optimizer
from kenotron.optim.zero import ShardedUpdate
from kenotron.parallel.apply import share_groups
from kenotron.strategies import _lightning
from kenotron.strategies.base import StrategyBase
from kenotron.strategies.checks import adopt_optimizer
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
            sizes = self._done.sizes_alike()
            self._offloaded = [HostState(each, sizes) for each in self.optimizers]

    def _shard_updates(self) -> list[ShardedUpdate]:
        """ZeRO 1: let each data-parallel rank update its share."""
        assert self._done is not None
        if self._mesh is None or self.layout.zero_stage != 1 or self.layout.dp_shard * self.layout.cp == 1:
            return []
        updates = []
        for optimizer in self.optimizers:
            update = ShardedUpdate(optimizer, self._done.names(), share_groups(self._done, self._mesh, self._expert_mesh),
                                   tied=self._done.shards.holders)  # fmt: skip
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
