"""Collectives as Lightning and user code ask for them: they see the data-parallel ranks, not copies of one sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kenotron.strategies.base import StrategyBase


class Collectives(StrategyBase):
    """``reduce`` and ``all_gather`` run over data-parallel ranks; decisions, broadcasts and barriers over all."""

    def barrier(self, name: str | None = None) -> None:
        if self._is_connected and not self._is_failing:
            device_ids = [self.root_device.index] if self.root_device.type == "cuda" else None
            dist.barrier(device_ids=device_ids)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not self._is_connected:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data-parallel ranks: user code sees that world alone, not copies of one sample."""
        if not isinstance(tensor, Tensor) or not self._is_connected:
            return tensor
        group = self._dp_group if group is None else group
        size = dist.get_world_size(group)
        if size == 1:
            return tensor
        name = reduce_op.lower() if isinstance(reduce_op, str) else None
        if name in ("mean", "avg", None) and (name or reduce_op in (None, dist.ReduceOp.AVG)):
            total = tensor.clone()
            dist.all_reduce(total, group=group)
            # Counters are integers; they have no place for a fraction.
            return total / size if total.is_floating_point() else total // size
        operation = getattr(dist.ReduceOp, name.upper()) if name else reduce_op
        result = tensor.clone()
        dist.all_reduce(result, op=operation, group=group)
        return result

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not self._is_connected:
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes > 0)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the data-parallel ranks."""
        if not self._is_connected:
            return tensor
        if group is None or group is dist.group.WORLD:
            group = self._dp_group
        gathered: Tensor = self.names.all_gather_if_available(tensor, group=group, sync_grads=sync_grads)
        return gathered
