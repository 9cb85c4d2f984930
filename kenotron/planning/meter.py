"""What a run on tensors without data keeps, computes and sends: every operator is seen by the dispatcher."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(kw_only=True)
class Tally:
    """What is computed, moved and sent in one direction of a part: operations, bytes, numbers."""

    gemm_flops: float = 0
    attention_flops: float = 0
    gemm_bytes: float = 0
    other_bytes: float = 0
    num_operators: int = 0
    num_collectives: int = 0
    sent: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Measured:
    """What a part keeps, in bytes, elements of its parameters, and what its two directions compute."""

    elements: int = 0
    expert_elements: int = 0
    largest: int = 0
    kept: int = 0
    cast: int = 0
    in_forward: int = 0
    in_backward: int = 0
    first_backward: int = 0
    output: int = 0
    entered: int = 0  # live at the entry of the forward pass, and at its end
    left: int = 0
    forward: Tally = field(default_factory=Tally)
    backward: Tally = field(default_factory=Tally)


class Meter(TorchDispatchMode):
    """Counts what operators return, as long as it lives, and what they compute, each for the part that is running.

    Args:
        blocks: names of the parts between "before" and "after".
    """

    def __init__(self, blocks: list[str]) -> None:
        super().__init__()
        self.names = ["before", *blocks, "after"]
        self.parts = {name: Measured() for name in self.names}
        self.buffer_bytes = 0
        self._live = 0
        self._gradients = 0  # of parameters, finished: they stay
        self._before_part = 0
        self._sizes: dict[int, int] = {}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._part, self._is_backward, self._is_leaving = "before", False, False
        self._reset_peaks()

    def _reset_peaks(self) -> None:
        self._peak = self._live
        self._peak_alone = self._live - self._gradients

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Parameters and buffers are counted by others."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        self._count_operator(func, args, kwargs, out, inputs, outputs)
        for tensor in outputs:
            self._count_storage(tensor.untyped_storage())
        return out

    def _count_storage(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._live += size
        weakref.finalize(storage, self._free, size, self._part)
        self._peak = max(self._peak, self._live)
        self._peak_alone = max(self._peak_alone, self._live - self._gradients)

    def _free(self, size: int, part: str) -> None:
        self._live -= size
        if self._is_leaving:
            self.parts[part].cast += size

    def _count_operator(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name, tally = func.name().removeprefix("aten::"), self._tally
        base = name.partition(".")[0]
        in_place = base.endswith("_") or "out" in kwargs
        storages = {id(t.untyped_storage()) for t in inputs}
        if not outputs or (not in_place and all(id(t.untyped_storage()) in storages for t in outputs)):
            return  # views
        if name.startswith(("empty", "detach", "lift")):
            return
        tally.num_operators += 1
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        if "attention" in name:
            tally.attention_flops += _attention_flops(name, inputs)
            return
        formula = flop_registry.get(getattr(torch.ops.aten, base.rstrip("_"), None))
        if formula is None:
            tally.other_bytes += moved
        else:
            tally.gemm_flops += formula(*args, **kwargs, out_val=out)
            tally.gemm_bytes += moved

    @property
    def _tally(self) -> Tally:
        part = self.parts[self._part]
        return part.backward if self._is_backward else part.forward

    def tell(self, kind: str, size: int) -> None:
        """Count a collective."""
        self._tally.num_collectives += 1
        self._tally.sent[kind] = self._tally.sent.get(kind, 0) + size

    # --------------------------------------------------------------------------------------------------- where we are

    def enter(self, part: str) -> None:
        """The forward pass of a part begins, and that of the part before it ends."""
        self._close_forward()
        self._part = part
        self.parts[part].entered = self._live
        self._reset_peaks()

    def _close_forward(self) -> None:
        part = self.parts[self._part]
        part.kept, part.left = self._live - part.entered, self._live
        part.in_forward = max(part.in_forward, self._peak - part.entered)

    def end_forward(self) -> None:
        """The forward pass of everything is over; what is freed from now on autocast has kept."""
        self._close_forward()
        self._is_leaving = True

    def begin_backward(self) -> None:
        """Autocast has let go of its copies of weights."""
        self._is_leaving, self._is_backward = False, True
        gone = 0
        for name in self.names:
            part = self.parts[name]
            gone += part.cast
            part.kept -= part.cast
            part.left -= gone
        self._before_part = self._gradients
        self._reset_peaks()

    def enter_backward(self, part: str) -> None:
        """The backward pass of a part begins, and that of the part after it ends."""
        self.leave_backward()
        self._part = part
        self._before_part = self._gradients
        self._reset_peaks()

    def leave_backward(self) -> None:
        part = self.parts[self._part]
        part.in_backward = max(part.in_backward, self._peak_alone - part.left)
        part.first_backward = max(part.first_backward, self._peak - self._before_part - part.left)

    def take_gradient(self, param: Tensor) -> None:
        """A parameter has its whole gradient."""
        assert param.grad is not None
        self._gradients += param.grad.untyped_storage().nbytes()


def _attention_flops(name: str, inputs: list[Tensor]) -> float:
    """Count both products of attention over all pairs of positions; the backward pass has five instead of two."""
    found = [t for t in inputs if t.ndim == 4]
    query, key, value = found[-3:] if "backward" not in name else found[1:4] if len(found) > 3 else found[:3]
    batch, heads, length = query.shape[0], query.shape[1], query.shape[2]
    pairs = batch * heads * length * key.shape[2]
    score, weighted = 2 * pairs * query.shape[3], 2 * pairs * value.shape[3]
    return 3 * score + 2 * weighted if "backward" in name else score + weighted
