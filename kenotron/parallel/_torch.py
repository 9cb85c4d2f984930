"""Every private torch name that Kénotron's core uses, and nowhere else. ``tests/parallel/test_torch_seam.py`` holds each."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining.stage import _RecvInfo as RecvInfo
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["RecvInfo", "compute_local_shape_and_global_offset", "default_store", "flatten", "group_options"]


def default_store() -> dist.Store:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def flatten(mesh: Any, *axes: str, name: str) -> Any:
    """Return one mesh dimension in place of several."""
    return mesh[axes]._flatten(name)


def group_options(device_type: str, timeout: timedelta) -> Any:
    """Return options of a process group with a time-out, for gloo (CPU) or NCCL (CUDA)."""
    options: Any
    if device_type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    return options
