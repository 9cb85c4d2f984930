"""Sequence parallelism: between linears that tensor parallelism has split, hidden states are cut along the sequence.

They are so from a stage's first block to its last one. Norms work on slices (their gradients are summed over tp). Attention and
MLP see whole sequences: where such a *region* consists of split linears alone, its entry gathers and its last linear
reduce-scatters; any other region (a router inside of it, say) is entered by a gather and left by a cut, with plain tensor
parallelism in between, which is right for any content.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kenotron.parallel._torch import with_real_tensors
from kenotron.parallel.collectives import gather_from, scatter_to
from kenotron.parallel.random import draws_masks
from kenotron.parallel.region import SEQUENCE_DIM, Region
from kenotron.parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class SequenceRegions:
    """How sequence parallelism goes through one block.

    Args:
        split: regions of split linears alone: they gather at their entry and reduce-scatter at their exit.
        whole: other regions: gathered at the entry, cut at the exit.
        slices: modules that work on slices.
    """

    split: tuple[str, ...]
    whole: tuple[str, ...]
    slices: tuple[str, ...]


_WORKS_ON_SLICES = (nn.Dropout, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.ReLU, nn.SiLU)


def _works_on_slices(module: nn.Module) -> bool:
    """Return whether a module gives each token what it gives it within the whole sequence: by class, or norms if they do."""
    if any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _WORKS_ON_SLICES):
        return len(getattr(module, "normalized_shape", (1,))) == 1
    sizes = [param.shape[-1] for param in module.parameters() if param.ndim]
    if not type(module).__name__.endswith("Norm") or not sizes:
        return False
    # The planner cuts modules without data; numbers are needed here.
    with with_real_tensors(), torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        memo: dict[int, Any] = {id(param): nn.Parameter(torch.rand(param.shape)) for param in module.parameters()}
        memo |= {id(buffer): torch.rand(buffer.shape).to(buffer.dtype) for buffer in module.buffers()}
        x = torch.rand(2, 4, sizes[0])
        try:
            norm = copy.deepcopy(module, memo).eval()
            whole, part = norm(x), norm(x[:, :2])
        except Exception:  # of any code: it is called otherwise, and then gets whole sequences
            return False
        return isinstance(whole, Tensor) and whole.shape == x.shape and torch.allclose(whole[:, :2], part, atol=1e-5)


def regions_of(block: nn.Module, name: str, styles: dict[str, str]) -> SequenceRegions:
    """Sort the children of a block (called ``name`` from the root) by what they need of the sequence."""
    split, whole, slices = [], [], []
    for child_name, child in block.named_children():
        full = f"{name}.{child_name}"
        if _works_on_slices(child):
            slices.append(full)
        elif _only_split_linears(child, full, styles):
            split.append(full)
        else:
            whole.append(full)
    return SequenceRegions(split=tuple(split), whole=tuple(whole), slices=tuple(slices))


def _only_split_linears(module: nn.Module, name: str, styles: dict[str, str]) -> bool:
    found = []
    for sub_name, sub in module.named_modules(prefix=name):
        for key, _ in sub.named_parameters(recurse=False):
            found.append(styles.get(sub_name) or styles.get(f"{sub_name}.{key}"))
    return "rowwise" in found and set(found) <= _IN_SPLIT_REGIONS


_IN_SPLIT_REGIONS = {
    "colwise",
    "rowwise",
    "packed_colwise",
    "packed_rowwise",
    "replicated_with_grad_allreduce",
    "rowwise_to_split",
    "split_rows",
}


def _enter_whole(shape: Region, tp: TensorParallel, x: Tensor) -> Tensor:
    return shape.enter(gather_from(x, SEQUENCE_DIM, tp.group, grad="slice"))


def _leave_whole(shape: Region, tp: TensorParallel, x: Tensor) -> Tensor:
    return shape.leave(x, lambda y: scatter_to(y, SEQUENCE_DIM, tp.group))


def apply_sequence_parallel(
    root: nn.Module, regions: dict[str, SequenceRegions], groups_of_blocks: Iterable[list[str]], tp: TensorParallel
) -> None:
    """Let hidden states be cut along the sequence from the first to the last block of each run of blocks.

    Args:
        regions: block name -> its regions. groups_of_blocks: runs of blocks, one per stage.
    """
    for blocks in groups_of_blocks:
        first, last = root.get_submodule(blocks[0]), root.get_submodule(blocks[-1])
        first.register_forward_pre_hook(_on_input(lambda x: _cut(x, tp)), with_kwargs=True)
        last.register_forward_hook(_on_output(lambda x: gather_from(x, SEQUENCE_DIM, tp.group, grad="slice")))
        for block_name in blocks:
            block, found = root.get_submodule(block_name), regions[block_name]
            for name in found.split:
                gather = _on_input(lambda x: tp.region.enter(gather_from(x, SEQUENCE_DIM, tp.group, grad="reduce_scatter")))
                root.get_submodule(name).register_forward_pre_hook(gather, with_kwargs=True)
            for name in found.whole:
                region = root.get_submodule(name)
                shape = Region()
                region.register_forward_pre_hook(_on_input(functools.partial(_enter_whole, shape, tp)), with_kwargs=True)
                region.register_forward_hook(_on_output(functools.partial(_leave_whole, shape, tp)))
            if draws_masks(block):
                _draw_apart(root, block, found, tp)
            for name in found.slices:
                tp.shards.partial.update(f"{name}.{key}" for key, _ in root.get_submodule(name).named_parameters())
            tp.shards.partial.update(f"{block_name}.{key}" for key, _ in block.named_parameters(recurse=False))


def _cut(x: Tensor, tp: TensorParallel) -> Tensor:
    length = x.shape[SEQUENCE_DIM]
    if length % tp.size:
        raise ValueError(
            f"sequence_parallel=True: sequences of {length} tokens can't be cut for tp={tp.size}. Pad them to a multiple of "
            f"{tp.size}, or set sequence_parallel=False."
        )
    return scatter_to(x, SEQUENCE_DIM, tp.group)


def _draw_apart(root: nn.Module, block: nn.Module, regions: SequenceRegions, tp: TensorParallel) -> None:
    """Let a block draw numbers of this rank's own, except in regions that all ranks run whole."""

    def enter(module: nn.Module, args: Any) -> None:
        if block.training:
            tp.random.enter()

    def leave(module: nn.Module, *args: Any) -> None:
        tp.random.leave()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave)
    for name in regions.whole:
        root.get_submodule(name).register_forward_pre_hook(leave)
        root.get_submodule(name).register_forward_hook(lambda m, args, out: enter(m, args))


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a pre-hook that changes the hidden state: the first positional argument, or ``hidden_states``."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (change(args[0]), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        raise ValueError(
            f"sequence_parallel=True: {type(module).__name__} gets its hidden state neither as first argument nor as "
            "hidden_states=. Set sequence_parallel=False."
        )

    return hook


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a hook that changes the hidden state in an output: the tensor itself, or the first of a tuple."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        raise ValueError(
            f"sequence_parallel=True: {type(module).__name__} returns {type(output).__name__}, not a hidden state or a tuple "
            "that begins with one. Set sequence_parallel=False."
        )

    return hook
