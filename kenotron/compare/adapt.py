"""What some strategies need before they run on any module, on any device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from kenotron.compare.strategies import make_strategy


class FSDPAnywhere(FSDPStrategy):
    """Lightning's FSDP, on CPUs as well: there Lightning refuses its own class, and torch wants to be told the device."""

    def setup(self, trainer: L.Trainer) -> None:
        """Wrap the module, where Lightning would leave the device to torch."""
        if self.root_device.type == "cpu" and self.model is not None:
            settings = {**self.kwargs, "device_id": self.root_device}
            self.kwargs.pop("auto_wrap_policy", None)
            self.model = FullyShardedDataParallel(
                self.model,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                **settings,
            )
        super().setup(trainer)


def strategy_for(text: str, module: L.LightningModule, device: torch.device) -> Any:
    """Return the strategy that ``text`` describes, and let the module do what the strategy leaves to it.

    On CPUs FSDP saves sharded checkpoints: torch 2.13 crashes where it puts whole ones together there, of memory that it has
    freed.
    """
    on_cpu = functools.partial(FSDPAnywhere, state_dict_type="sharded")
    strategy = make_strategy(text, instead={FSDPStrategy: on_cpu if device.type == "cpu" else FSDPAnywhere})
    if isinstance(strategy, ModelParallelStrategy):
        shard_in_configure_model(module)
    return strategy


def start_from(module: L.LightningModule, weights: Path) -> None:
    """Let a module that is built in ``configure_model`` begin with the same weights under every strategy.

    What is built on the meta device is left alone: `Initialise` fills it when the strategy has made it.
    """
    configure_model = module.configure_model

    @functools.wraps(configure_model)
    def with_weights() -> None:
        was_built = any(True for _ in module.parameters())
        configure_model()
        if not was_built and not any(p.is_meta for p in module.parameters()):
            module.load_state_dict(torch.load(weights, mmap=True, weights_only=True))

    module.configure_model = with_weights  # type: ignore[method-assign]


def shard_in_configure_model(module: L.LightningModule) -> None:
    """Shard a module by FSDP2 where its ``configure_model`` does not do so itself: ModelParallelStrategy leaves that to it."""
    configure_model = module.configure_model

    def sharded() -> None:
        configure_model()
        if not any(isinstance(p, DTensor) for p in module.parameters()):
            _shard(module)

    module.configure_model = sharded  # type: ignore[method-assign]


def _shard(module: L.LightningModule) -> None:
    assert module.device_mesh is not None
    mesh = module.device_mesh["data_parallel"]
    for each in [*_blocks(module), *_with_forward(module)]:  # inner ones first
        if not all(isinstance(p, DTensor) for p in each.parameters()):
            fully_shard(each, mesh=mesh)
    for own in module.parameters(recurse=False):  # nobody calls the module itself, so FSDP2 could not gather these
        own.register_post_accumulate_grad_hook(functools.partial(_average, size=mesh.size()))


def _average(param: torch.Tensor, size: int) -> None:
    assert param.grad is not None
    dist.all_reduce(param.grad)
    param.grad /= size


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the like layers of a module, inner ones first: the members of its lists that have parameters."""
    for child in module.children():
        yield from _blocks(child)
        if isinstance(module, nn.ModuleList) and _has_forward(child) and any(True for _ in child.parameters()):
            yield child


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost children that are called themselves, and have parameters."""
    for child in module.children():
        if not any(True for _ in child.parameters()):
            continue
        if _has_forward(child):
            yield child
        else:
            yield from _with_forward(child)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList | nn.ModuleDict)
