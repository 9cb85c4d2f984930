"""Data parallelism: replicas whose gradients are averaged (ZeRO 0), or FSDP2 (ZeRO 1 to 3)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torchmetrics import Metric

from kenotron.parallel.gathered import GatheredParameters
from kenotron.parallel.shards import take_over
from kenotron.parallel.stages import has_forward, lists_of_like_layers

_BUCKET_BYTES = 25 * 2**20


class GradientReducer:
    """Averages gradients over the replicas while the backward pass still runs.

    Parameters are put into flat buckets in reverse order of registration, which is about the order in which their gradients
    appear. A bucket whose gradients are all there is reduced at once, asynchronously; buckets are reduced in one fixed order,
    so that all ranks agree. After `finish` each gradient is a view into its bucket.

    Args:
        params: what is replicated; those without ``requires_grad`` join when they are unfrozen.
        group: the replicas.
        divisor: of their sum; ``None``: their number. Spread experts already sum over the ranks that send them tokens.
    """

    def __init__(self, params: Iterable[nn.Parameter], group: dist.ProcessGroup, divisor: int | None = None) -> None:
        self.group = group
        self.divisor = divisor or dist.get_world_size(group)
        self._averages = dist.get_backend(group) == "nccl" and self.divisor == dist.get_world_size(group)
        self._waiting = list(params)
        self._buckets: list[_Bucket] = []
        self._armed = False
        self._launched = 0
        self._take_in()

    def _take_in(self) -> None:
        """Make buckets for parameters that are trained and have none yet."""
        trained = [p for p in self._waiting if p.requires_grad]
        if not trained:
            return
        self._waiting = [p for p in self._waiting if not p.requires_grad]
        # Python's collector does not see through hooks of C++: with itself in them, neither this object, nor the model, nor the
        # connections of the group would ever go.
        reducer = weakref.ref(self)

        def ready(param: Tensor, number: int, index: int) -> None:
            if (alive := reducer()) is not None:
                alive._ready(alive._buckets[number], index)

        for bucket in map(_Bucket, _buckets(trained)):
            for index, param in enumerate(bucket.params):
                hook = functools.partial(ready, number=len(self._buckets), index=index)
                param.register_post_accumulate_grad_hook(hook)
            self._buckets.append(bucket)

    def arm(self) -> None:
        """Let the backward pass that comes reduce; without it gradients only accumulate."""
        self._take_in()
        self._armed = True

    def _ready(self, bucket: _Bucket, index: int) -> None:
        if not self._armed:
            return
        bucket.ready.add(index)
        while self._launched < len(self._buckets) and self._buckets[self._launched].is_ready:
            self._launch()

    def _launch(self) -> None:
        self._buckets[self._launched].launch(self.group, self.divisor, self._averages)
        if self._launched:  # not those of this one: hooks of the user's may look at them now
            self._buckets[self._launched - 1].free_gradients()
        self._launched += 1

    def finish(self) -> None:
        """Reduce what is left and wait for all of it."""
        while self._launched < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            bucket.collect()
        self._armed, self._launched = False, 0


class _Bucket:
    """Parameters of one dtype and device whose gradients travel together, and a flag for each: does it have one?

    The memory in which they travel is that of the averaged gradients, and is freed with them.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        self.ready: set[int] = set()
        self._had: list[bool] = []  # a gradient on this rank
        self._buffer: Tensor | None = None
        self._work: dist.Work | None = None

    @property
    def is_ready(self) -> bool:
        return len(self.ready) == len(self.params)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer[: -len(self.params)].split([param.numel() for param in self.params])
        return [_laid_out_like(param, part) for part, param in zip(parts, self.params, strict=True)]

    @torch.no_grad()
    def launch(self, group: dist.ProcessGroup, divisor: int, averages: bool) -> None:
        """Start to average; ``averages``: the group's backend can do so, otherwise it is done while gradients are copied."""
        first, numel = self.params[0], sum(param.numel() for param in self.params)
        self._buffer = buffer = torch.empty(numel + len(self.params), dtype=first.dtype, device=first.device)
        self._had = [param.grad is not None for param in self.params]
        present: list[tuple[Tensor, Tensor]] = []
        for view, param in zip(self._views(buffer), self.params, strict=True):
            if param.grad is None:
                view.zero_()
                continue
            if param.grad.layout != torch.strided:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} has a gradient of layout {param.grad.layout}, and gradients "
                    "are averaged dense. Set sparse=False where the module is made (nn.Embedding, nn.EmbeddingBag)."
                )
            present.append((view, param.grad))
        if averages and present:
            torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
        for view, grad in () if averages else present:
            torch.mul(grad, 1 / divisor, out=view)
        flags = buffer[numel:].fill_(1)
        for index, had in enumerate(self._had):
            if not had:
                flags[index] = 0
        operation = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
        self._work = dist.all_reduce(buffer, operation, group=group, async_op=True)

    def free_gradients(self) -> None:
        """Let go of this rank's own gradients, which have been copied."""
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """Give parameters the averaged gradients."""
        assert self._work is not None and self._buffer is not None
        self._work.wait()
        flags = self._buffer[-len(self.params) :]
        for index, (param, view) in enumerate(zip(self.params, self._views(self._buffer), strict=True)):
            # A parameter that no replica used keeps no gradient; the flag is read only where this rank has none.
            param.grad = view if self._had[index] or flags[index] > 0 else None
        self._work = self._buffer = None
        self.ready.clear()


def _laid_out_like(param: Tensor, flat: Tensor) -> Tensor:
    """Return ``flat`` in a parameter's shape and, where that has no gaps, its strides, as fused optimizers expect."""
    extent = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
    if param.is_contiguous() or extent != param.numel() or 0 in param.stride():
        return flat.view(param.shape)
    return flat.as_strided(param.shape, param.stride(), flat.storage_offset())


def _buckets(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[nn.Parameter], int]] = {}
    for param in reversed(params):
        kind = (param.dtype, param.device)
        members, size = open_buckets.get(kind, ([], 0))
        if not members or size >= _BUCKET_BYTES:
            members, size = [], 0
            buckets.append(members)
        members.append(param)
        open_buckets[kind] = (members, size + param.numel() * param.element_size())
    return buckets


class SharedBuffers:
    """Keeps buffers that a forward pass writes (running statistics) the same on all replicas: those of the first one.

    As torch's DistributedDataParallel does it, before each training step. A checkpoint then holds what every replica goes on
    with. Only persistent buffers count; a module without any costs nothing.

    Args:
        root: the module. group: the replicas.
    """

    def __init__(self, root: nn.Module, group: dist.ProcessGroup) -> None:
        names = root.state_dict().keys()
        metrics = [name + "." for name, module in root.named_modules() if isinstance(module, Metric)]
        self._group = group
        self._source = dist.get_global_rank(group, 0)
        self._by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name, buffer in root.named_buffers():
            if name in names and buffer.numel() and not name.startswith(tuple(metrics)):
                self._by_dtype.setdefault(buffer.dtype, []).append(buffer)

    @torch.no_grad()
    def share(self) -> None:
        """Give the first replica's buffers to all."""
        for buffers in self._by_dtype.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, self._source, group=self._group)
            parts = flat.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])


class FullySharded:
    """ZeRO 1 to 3 by torch's ``fully_shard``: one group per layer, one for all the rest at the root.

    Args:
        root: the module; parameters that no layer takes are gathered whenever `enclose` runs something.
        layers: modules that are gathered one by one when they are called.
        mesh: one dimension (shard) or two (replicate, shard).
        zero_stage: 1, 2 or 3.
        ignored: parameters which stay as they are. group: the ranks over which gradients are averaged.
        experts: modules that are gathered one by one over a mesh of their own, ``expert_mesh``.
        gather_bf16: parameters are gathered, and used, as bfloat16; gradients are reduced and kept in float32.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[nn.Module],
        mesh: DeviceMesh,
        zero_stage: int,
        ignored: set[nn.Parameter],
        group: dist.ProcessGroup,
        experts: Sequence[nn.Module] = (),
        expert_mesh: DeviceMesh | None = None,
        *,
        gather_bf16: bool = False,
    ) -> None:
        self.zero_stage = zero_stage
        before = _all_parameters(root)
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored}
        if gather_bf16:  # what goes in is autocast's to cast
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in experts:
            assert expert_mesh is not None
            self._shard_experts(module, expert_mesh, mesh.size(), options)
        # Layers are kept whole between forward and backward except in stage 3.
        for layer in layers:
            fully_shard(layer, reshard_after_forward=zero_stage == 3, **options)
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
                fully_shard(child, reshard_after_forward=self.zero_stage == 3, **options)
        fully_shard(experts, reshard_after_forward=self.zero_stage == 3, **{**options, "mesh": mesh})
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

    def before_backward(self, *, last_microbatch: bool, sync: bool) -> None:
        """Say what the next backward pass does.

        Args:
            last_microbatch: it is the last one of this step on this rank.
            sync: the step ends with an update (it is not one of several that accumulate).
        """
        # Stage 1 reduces once per update; 2 and 3 reduce-scatter every microbatch and accumulate shards.
        self.root.set_requires_gradient_sync((last_microbatch and sync) if self.zero_stage == 1 else True)
        self.root.set_is_last_backward(last_microbatch)
        self.root.set_reshard_after_backward(last_microbatch or self.zero_stage == 3)

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
