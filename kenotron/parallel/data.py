"""Data parallelism: what replicas share beside gradients, and FSDP2 (ZeRO 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from kenotron.parallel.gathered import GatheredParameters
from kenotron.parallel.shards import take_over
from kenotron.parallel.stages import has_forward, lists_of_like_layers


class SharedBuffers:
    """Keeps buffers that a forward pass writes (running statistics) the same on all replicas: those of the first one.

    As torch's DistributedDataParallel does it, before each training step. A checkpoint then holds what every replica goes on
    with. Only persistent buffers count; a module without any costs nothing. Where a module has put another tensor in the place
    of one (``self.bank = torch.cat(…)``), it is each replica's own, as there, but for the statistics of torch's norms.

    Args:
        root: the module. group: the replicas.
    """

    def __init__(self, root: nn.Module, group: dist.ProcessGroup) -> None:
        names = root.state_dict().keys()
        metrics = [name + "." for name, module in root.named_modules() if isinstance(module, Metric)]
        self._group = group
        self._source = dist.get_global_rank(group, 0)
        self._places = [
            (root.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer)
            for name, buffer in root.named_buffers()
            if name in names and buffer.numel() and not name.startswith(tuple(metrics))
        ]

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        found: dict[torch.dtype, list[Tensor]] = {}
        for module, name, former in self._places:
            buffer = module._buffers.get(name)
            if buffer is not None and (buffer is former or isinstance(module, _NormBase)):
                found.setdefault(buffer.dtype, []).append(buffer)
        return found

    @torch.no_grad()
    def share(self) -> None:
        """Give the first replica's buffers to all."""
        for buffers in self._by_dtype().values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, self._source, group=self._group)
            parts = flat.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])


class FullySharded:
    """ZeRO 3 by torch's ``fully_shard``: one group per layer, one for all the rest at the root.

    Args:
        root: the module; parameters that no layer takes are gathered whenever `enclose` runs something.
        layers: modules that are gathered one by one when they are called.
        mesh: one dimension (shard) or two (replicate, shard).
        ignored: parameters which stay as they are. group: the ranks over which gradients are averaged.
        experts: modules that are gathered one by one over a mesh of their own, ``expert_mesh``.
        gather_bf16: parameters are gathered, and used, as bfloat16; gradients are reduced and kept in float32.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[nn.Module],
        mesh: DeviceMesh,
        ignored: set[nn.Parameter],
        group: dist.ProcessGroup,
        experts: Sequence[nn.Module] = (),
        expert_mesh: DeviceMesh | None = None,
        *,
        gather_bf16: bool = False,
    ) -> None:
        before = _all_parameters(root)
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored}
        if gather_bf16:  # what goes in is autocast's to cast
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in experts:
            assert expert_mesh is not None
            self._shard_experts(module, expert_mesh, mesh.size(), options)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True, **options)
        # A method of the root that FSDP2 treats as its forward: user code runs inside of it, whatever it is called.
        root.__dict__["_kenotron_enclose"] = _call
        fully_shard(root, reshard_after_forward=False, **options)
        register_fsdp_forward_method(root, "_kenotron_enclose")
        assert isinstance(root, FSDPModule)
        self.root = root
        for old, new in dict(zip(before, _all_parameters(root), strict=True)).items():
            take_over(old, new)
        self.gathered = GatheredParameters(root, group, same_dtype=not gather_bf16)

    def _shard_experts(self, experts: nn.Module, mesh: DeviceMesh, replicas: int, options: dict[str, Any]) -> None:
        """Shard spread experts over the ranks that hold the same ones."""
        for child in experts.children():  # what all experts share is data parallel like everything else
            if any(True for _ in child.parameters()):
                fully_shard(child, reshard_after_forward=True, **options)
        fully_shard(experts, reshard_after_forward=True, **{**options, "mesh": mesh})
        assert isinstance(experts, FSDPModule)
        # The sum over the ranks that hold an expert is over all that send it tokens.
        experts.set_gradient_divide_factor(float(replicas))
        shard_group = mesh.get_group(mesh.ndim - 1)
        if shard_group.size() > 1 and dist.get_backend(shard_group) != "nccl":  # only NCCL multiplies while it sums
            experts.set_force_sum_reduction_for_comms(True)

    def enclose(self, call: Any) -> Any:
        """Run ``call()`` with the root's own parameters gathered."""
        self.gathered.begin()
        return self.root.__dict__["_kenotron_enclose"](call)

    def before_backward(self, *, last_microbatch: bool) -> None:
        """Say what the next backward pass does: every one reduce-scatters, and shards of gradients add up.

        Args:
            last_microbatch: it is the last one of this step on this rank.
        """
        self.root.set_is_last_backward(last_microbatch)

    def reshard(self) -> None:
        """Free gathered parameters: after evaluation nothing else would, and an update would not reach them."""
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _all_parameters(root: nn.Module) -> list[nn.Parameter]:
    return [param for _, param in root.named_parameters(remove_duplicate=False)]


def _call(call: Any) -> Any:
    return call()


def layers_to_shard(root: nn.Module, blocks: str | None, manual_optimization: bool) -> list[nn.Module]:
    """Return the modules that are gathered on their own.

    These are the blocks, or the layers of every list of like layers. With manual optimization each child of the root is
    added: updates happen inside the step, so nothing may be gathered for as long as the step lasts. Of containers, which
    nobody calls, it is their parts.
    """
    # A leaf's weight may be used without calling the leaf: layers without children stay with the root.
    names = [blocks] if blocks else lists_of_like_layers(root, composite=True)
    layers = [
        part for name in names for child in root.get_submodule(name).children() for part in _called(child)
        if part is child or any(True for _ in part.children())
    ]  # fmt: skip
    if manual_optimization:
        layers += [part for child in root.children() for part in _called(child)]
    return [layer for layer in dict.fromkeys(layers) if any(p.numel() for p in layer.parameters())]


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or its parts if it is a container without a forward of its own."""
    if has_forward(module):
        yield module
    else:
        for child in module.children():
            yield from _called(child)
