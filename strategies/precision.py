"""Precision plugins under sharding: which ones work, and a gradient scaler on which all ranks agree."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from kenotron.layout import ParallelLayout
from kenotron.parallel.grads import local

_SUPPORTED = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


def check_precision(plugin: Any, layout: ParallelLayout) -> None:
    """Raise ``ValueError`` for a precision plugin that can't work on more than one rank."""
    precision = str(plugin.precision)
    if layout.world_size > 1 and precision not in _SUPPORTED:
        raise ValueError(f"precision={precision!r} does not work on several ranks. Set one of {', '.join(_SUPPORTED)}.")


def check_gather(plugin: Any, layout: ParallelLayout) -> None:
    """Raise ``ValueError`` where weights can't be gathered as bfloat16."""
    if str(plugin.precision) != "bf16-mixed":
        raise ValueError(
            f"gather_bf16=True goes with precision='bf16-mixed', which casts the rest, and precision is {plugin.precision!r}. "
            "Set that precision, or leave gather_bf16 out."
        )
    if layout.zero_stage < 3:
        raise ValueError(
            f"gather_bf16=True with zero_stage={layout.zero_stage}: weights are whole, and none is gathered for a step. Set "
            "zero_stage=3, or leave it out."
        )


def share_overflow(plugin: Any) -> None:
    """Let a fp16 plugin's scaler skip a step on all ranks where one rank's gradients overflow."""
    scaler = getattr(plugin, "scaler", None)
    if scaler is None or isinstance(scaler, SharedGradScaler) or not scaler.is_enabled():
        return
    shared = SharedGradScaler(
        device=plugin.device,
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
    )
    shared.load_state_dict(scaler.state_dict())
    plugin.scaler = shared


class SharedGradScaler(torch.amp.GradScaler):
    """torch's gradient scaler over sharded gradients: an overflow anywhere is one everywhere."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not allow_fp16 and param.grad.dtype == torch.float16:
                    raise ValueError("gradients are float16, so there is no precision to unscale in. Keep weights in float32.")
                grad = local(param.grad)
                by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
        found_inf = found_inf.clone()
        for grads in by_kind.values():
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale.to(found_inf.device))
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}
