"""Tensor parallelism whose transfers travel behind the matrix products that need them, or make what they send ("async TP").

torch's compiler finds an all-gather whose result is multiplied, and a product whose result is reduce-scattered, and makes one
operator of the two that works chunk by chunk through symmetric memory: memory of one GPU that the others can read. Sequence
parallelism has such pairs, at the entry and the exit of attention and MLP, and in the backward pass. With fused projections
(``kenotron.models.Decoder``) there are four in each region; where several products follow one gather, three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from kenotron.parallel._torch import OVERLAP_OPTION, share_memory


def check_async_tp(device: torch.device, tp: int) -> None:
    """Raise ``ValueError`` where GPUs can't read each other's memory."""
    if device.type != "cuda":
        raise ValueError(
            f"async_tp=True works through memory that GPUs share, and this rank is on {device}. Set async_tp=False."
        )
    count = torch.cuda.device_count()
    if count < tp:
        raise ValueError(
            f"async_tp=True with tp={tp} over {count} visible GPUs: the tp ranks must be on one node and see each other. Set "
            f"tp to {count} or less, or async_tp=False."
        )
    own = torch.cuda.current_device() if device.index is None else device.index
    strangers = [other for other in range(count) if other != own and not torch.cuda.can_device_access_peer(own, other)]
    if strangers:
        raise ValueError(
            f"async_tp=True: GPU {own} can't read the memory of GPU {strangers[0]}, as NVLink or PCIe peers can. Set "
            "async_tp=False."
        )


def compile_options(group: dist.ProcessGroup) -> dict[str, Any]:
    """Return what ``torch.compile`` is told so that transfers of ``group`` overlap. All ranks of the group call it."""
    share_memory(group)
    return {OVERLAP_OPTION: True}
