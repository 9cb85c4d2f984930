"""Every private torch name that Kénotron's core uses, and nowhere else. ``tests/parallel/test_torch_seam.py`` holds each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as with_real_tensors
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.stage import _RecvInfo as RecvInfo
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._device import _device_constructors as device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "OVERLAP_OPTION",
    "FakeTensor",
    "FakeTensorMode",
    "RecvInfo",
    "SilentGroup",
    "TorchDispatchMode",
    "compute_local_shape_and_global_offset",
    "default_store",
    "device_constructors",
    "flatten",
    "fsdp_groups",
    "functional_all_gather",
    "functional_reduce_scatter",
    "group_options",
    "is_in_backward",
    "set_local",
    "share_memory",
    "storage_id",
    "unsharded_parameters",
    "watch_compilation",
    "with_real_tensors",
    "without_functions",
]

# torch 2.13 renamed these two; pyproject.toml allows 2.11. (x, dim, group) and (x, "sum", dim, group): equal slices along dim.
functional_all_gather: Callable[..., Tensor] = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
functional_reduce_scatter: Callable[..., Tensor] = (
    getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
)

#: A context in which modes and subclasses see no call of torch's functions.
without_functions = torch._C.DisableTorchFunction

#: An option of ``torch.compile``: collectives beside matrix products become one operator with them.
OVERLAP_OPTION = "_micro_pipeline_tp"


def share_memory(group: dist.ProcessGroup) -> None:
    """Let the compiler use symmetric memory for collectives of a group. All its ranks call it."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)


def default_store() -> dist.Store:
    """Return the key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def unsharded_parameters(root: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what autograd knows each parameter of FSDP2 by once it was gathered, and the sharded parameter."""
    for group in fsdp_groups(root):
        for param in group.fsdp_params:
            if hasattr(param, "_unsharded_param"):
                yield param._unsharded_param, param.sharded_param


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


class _Done(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True


class SilentGroup(dist.ProcessGroup):
    """The first of ``size`` ranks, of which the others do not exist: collectives return at once, with whatever was there.

    Args:
        tell: called with the name of each collective and the bytes of its whole (not sharded) side.
    """

    def __init__(self, size: int, tell: Callable[[str, int], None]) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]  # torch's stub knows of one constructor
        self._tell = tell

    def _count(self, kind: str, tensors: Sequence[Tensor]) -> dist.Work:
        self._tell(kind, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return _Done()

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:  # type: ignore[override]
        return self._count("all_reduce", tensors)

    def broadcast(self, tensors: Any, opts: Any = None) -> dist.Work:  # type: ignore[override]
        return self._count("broadcast", tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self._count("all_gather", [output])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self._count("reduce_scatter", [input])

    def alltoall_base(self, output: Tensor, input: Tensor, *options: Any) -> dist.Work:
        return self._count("all_to_all", [input])

    # As they were called before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]


def watch_compilation(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
    """Call ``begin`` and ``end`` around every compilation of ``torch.compile``, backward graphs too; return what ends that."""
    from torch._dynamo.callback import callback_handler  # brings in the whole compiler

    def on_begin(*_: Any) -> None:
        begin()

    def on_end(*_: Any) -> None:
        end()

    callback_handler.register_start_callback(on_begin)
    callback_handler.register_end_callback(on_end)

    def stop() -> None:
        callback_handler.remove_start_callback(on_begin)
        callback_handler.remove_end_callback(on_end)

    return stop


def is_in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def set_local(tensor: DTensor, part: Tensor) -> None:
    """Let a DTensor have its local part elsewhere, of the same shape: in host memory, say, while nothing computes with it."""
    tensor._local_tensor = part


def fsdp_groups(root: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters, each of which is gathered at once."""
    states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]
    # torch 2.13 allows several for a module.
    found = [getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states]
    return [group for groups in found for group in groups if group is not None]


def storage_id(tensor: Tensor) -> int:
    """Return what stays the same until a tensor is given other data (``tensor.data = …``)."""
    return int(tensor.untyped_storage()._cdata)
