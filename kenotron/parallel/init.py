"""Initial weights that do not depend on the layout, and never a full model in one process.

Weights that exist when the strategy starts come from the user's constructor; rank 0's are given to all. Weights on the
meta device (built in ``configure_model``) are made module by module after everything is cut: the module's own initialiser
runs on full-size parameters of this one module, with a seed made of the run's seed and the module's name, and this
rank keeps its part.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kenotron.parallel._torch import compute_local_shape_and_global_offset
from kenotron.parallel.plan import transformers_models
from kenotron.parallel.shards import Shards, TensorShard, canonical


@torch.no_grad()
def broadcast_weights(root: nn.Module, device: torch.device) -> None:
    """Give rank 0's parameters and buffers to all ranks. Tensors on the meta device have no weights yet.

    Raises:
        ValueError: the ranks built different modules.
    """
    tensors = [t for t in [*root.parameters(), *root.buffers()] if not t.is_meta and t.numel()]
    signature = [(tuple(t.shape), str(t.dtype)) for t in tensors]
    box: list[Any] = [signature]
    dist.broadcast_object_list(box, 0)
    if box[0] != signature:
        raise ValueError(
            f"this rank built another module than rank 0 ({len(signature)} weights against {len(box[0])}): every rank must "
            "build the same one. Build it from the same configuration, and never by rank."
        )
    for tensor in tensors:
        if tensor.device.type == device.type:
            dist.broadcast(tensor.data, 0)
        else:
            moved = tensor.data.to(device)
            dist.broadcast(moved, 0)
            tensor.data.copy_(moved)


@torch.no_grad()
def materialize(root: nn.Module, shards: Shards, aliases: Mapping[str, str], seed: int, device: torch.device) -> None:
    """Replace every meta parameter and buffer of ``root`` by this rank's part of its initial value.

    Args:
        aliases: further names of tied parameters -> their first name, under which ``shards`` knows them.

    Raises:
        ValueError: a module with meta parameters that has no initialiser.
    """
    initialisers = dict(_initialisers(root))

    def shard_of(name: str, key: str, param: Tensor) -> TensorShard:
        full = canonical(f"{name}.{key}" if name else key)
        return shards.of(aliases.get(full, full), param)

    done: dict[int, nn.Parameter] = {}
    for name, module in root.named_modules():
        parameters = {k: p for k, p in module._parameters.items() if p is not None and p.is_meta}
        if not any(True for _ in parameters) and not any(b is not None and b.is_meta for b in module._buffers.values()):
            continue
        if all(p.numel() == 0 for p in parameters.values()) and parameters:
            for key, param in parameters.items():  # another stage's: nothing to fill
                module._parameters[key] = nn.Parameter(torch.empty_like(param, device="cpu"), param.requires_grad)
            continue
        shard = {key: shard_of(name, key, param) for key, param in parameters.items()}
        whole = _initial_values(name, module, shard, initialisers.get(name), seed)
        for key, param in parameters.items():
            if id(param) not in done:
                done[id(param)] = _local_parameter(shard[key], param, whole[key], device)
            module._parameters[key] = done[id(param)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = whole[key].to(device)


def _initial_values(
    name: str,
    module: nn.Module,
    shards: dict[str, TensorShard],
    initialise: Any,
    seed: int,
) -> dict[str, Tensor]:
    """Run the initialiser of one module on full-size parameters in host memory."""
    model = object.__new__(type(module))  # not copy.copy: FSDP2's classes call __init__ when they are made
    model.__dict__ = {**module.__dict__, "_parameters": {}}
    for key, param in module._parameters.items():
        if param is None or key not in shards:
            model._parameters[key] = param
            continue
        whole = torch.full(shards[key].global_shape, torch.nan, dtype=param.dtype)
        model._parameters[key] = nn.Parameter(whole, param.requires_grad)
    model._buffers = {
        key: torch.empty_like(b, device="cpu") if b is not None and b.is_meta else b for key, b in module._buffers.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + zlib.crc32(canonical(name).encode())) % 2**63)
        if initialise is not None:
            initialise(model)
        reset = getattr(model, "reset_parameters", None) or getattr(model, "_reset_parameters", None)
        # Where an initialiser from outside does not know a module, it leaves it to itself.
        if callable(reset) and all(torch.isnan(model._parameters[key].view(-1)[0]) for key in shards):  # type: ignore[union-attr]
            reset()
    values: dict[str, Tensor] = {k: v for k, v in {**model._parameters, **model._buffers}.items() if v is not None}
    for key in shards:
        if torch.isnan(values[key].view(-1)[0]):
            raise ValueError(
                f"{name}.{key} was built on the meta device and {type(module).__name__} has no initialiser for it. Give the "
                "module a method reset_parameters() that fills it, or build it in __init__ instead of configure_model."
            )
    return values


def _local_parameter(shard: TensorShard, param: nn.Parameter, whole: Tensor, device: torch.device) -> nn.Parameter:
    mine = shard.take(whole)
    if isinstance(param, DTensor):
        shape, offset = compute_local_shape_and_global_offset(mine.shape, param.device_mesh, param.placements)
        for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
            mine = mine.narrow(dim, start if length else 0, length)
        local = mine.to(device, copy=True)
        value: Tensor = DTensor.from_local(
            local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
    else:
        value = mine.to(device, copy=mine.data_ptr() == whole.data_ptr() and mine.numel() != whole.numel())
    return nn.Parameter(value, requires_grad=param.requires_grad)


def _initialisers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(module name, initialiser)`` for modules inside of transformers models, which initialise from outside."""
    for prefix, model in transformers_models(root):
        for name, _ in model.named_modules(prefix=prefix):
            ancestors = (
                root.get_submodule(name[:i]) for i in range(len(name), -1, -1) if i in (0, len(name)) or name[i] == "."
            )
            nearest = next((a for a in ancestors if hasattr(a, "_init_weights")), model)
            yield name, nearest._init_weights
