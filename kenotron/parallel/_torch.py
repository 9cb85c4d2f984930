"""Every private torch name that Kénotron's core uses, and nowhere else. ``tests/parallel/test_torch_seam.py`` holds each."""

from torch.distributed.pipelining.stage import _RecvInfo as RecvInfo
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["RecvInfo", "compute_local_shape_and_global_offset"]
