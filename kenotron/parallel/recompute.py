"""What blocks keep for the backward pass: everything, their inputs alone, or the results of named operators.

Blocks are the layers of the module's list of like layers. Their ``forward`` is wrapped, inside of every hook: gathers of ZeRO
and of sequence parallelism, pipelines and compiled graphs stay outside, and random numbers are drawn again alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

RecomputeMode = Literal["none", "full", "selective"]
MODES = ("none", "full", "selective")

#: Matrix products and attention: what takes longest to compute again for the bytes that it keeps.
DEFAULT_OPERATORS = (
    "aten.mm",
    "aten.addmm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What blocks keep for the backward pass.

    Args:
        mode: ``"none"``: everything. ``"full"``: their inputs, from which they are computed again. ``"selective"``: also what
            ``operators`` return.
        operators: as torch names them, such as ``"aten.mm"``; all overloads of each.
        alternate: of matrix products among ``operators`` keep only every second one of a block: between those that are kept
            lie narrow ones as a rule (the output of attention, the end of an MLP).
        every: only each n-th block is computed again.
        budget: in the place of ``every``: the share of the blocks that may keep everything, from 0 to 1; those that don't are
            spread evenly.
        offload: what blocks keep lies in host memory until the backward pass.

    Raises:
        ValueError: a mode or operator that does not exist, or numbers out of range.
    """

    mode: RecomputeMode = "none"
    operators: Sequence[str] = DEFAULT_OPERATORS
    alternate: bool = True
    every: int = 1
    budget: float | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"recompute={self.mode!r} is unknown. Set it to one of {', '.join(map(repr, MODES))}.")
        if self.every < 1:
            raise ValueError(f"recompute every={self.every}: set it to 1 for each block, 2 for each second one, and so on.")
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ValueError(f"recompute budget={self.budget}: set the share of blocks that may keep everything, from 0 to 1.")
        if self.budget is not None and self.every != 1:
            raise ValueError(f"recompute every={self.every} with budget={self.budget}: both say which blocks. Set one of them.")
        if self.mode == "selective":
            self.overloads()

    @staticmethod
    def of(setting: RecomputeMode | Recompute) -> Recompute:
        """Return the settings that a mode alone stands for."""
        return setting if isinstance(setting, Recompute) else Recompute(mode=setting)

    def __bool__(self) -> bool:
        return self.mode != "none" or self.offload

    def overloads(self) -> set[Any]:
        """Return the operators, as torch's dispatcher has them."""
        return {getattr(packet, name) for packet in map(_packet, self.operators) for name in packet.overloads()}

    def chosen(self, count: int) -> list[bool]:
        """Return which of ``count`` blocks are computed again."""
        if self.budget is None:
            return [index % self.every == 0 for index in range(count)]
        again = round((1 - self.budget) * count)
        return [(index + 1) * again // count > index * again // count for index in range(count)]

    def apply(self, blocks: Sequence[nn.Module]) -> None:
        """Wrap the ``forward`` of each block."""
        contexts = None
        if self.mode == "selective":
            contexts = functools.partial(_contexts, frozenset(self.overloads()), alternate=self.alternate)
        for block, again in zip(blocks, self.chosen(len(blocks)), strict=True):
            if again and self.mode != "none":
                block.forward = _recomputed(block.forward, contexts)
            if self.offload:
                block.forward = _offloaded(block.forward)


def _packet(name: str) -> Any:
    namespace, _, operator = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), operator, None) if operator else None
    if packet is None:
        raise ValueError(
            f"recompute operators: torch has no {name!r}. Name them as its dispatcher does: 'aten.mm', 'aten.bmm', …"
        )
    return packet


def _recomputed(forward: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    further: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **further, **kwargs)

    return recomputed


def _contexts(kept: frozenset[Any], *, alternate: bool) -> Any:
    products = {False: 0, True: 0}  # so far, in the first run and when computed again

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = operator in kept
        if is_kept and alternate and operator in _PRODUCTS:
            is_kept = products[context.is_recompute] % 2 == 0
            products[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return forward(*args, **kwargs)

    return offloaded


def compile_blocks(blocks: Sequence[nn.Module], options: dict[str, Any] | None = None) -> None:
    """Let each block's ``forward`` be compiled when it is first called; like blocks share their code.

    Args:
        options: of ``torch.compile``.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, options=options)
