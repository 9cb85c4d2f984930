"""FLOPs of a training step of any model, counted while it runs: what a user's code multiplies, wherever it does so.

A :class:`FlopCounter` is switched on around one step, forward and backward. Each rank notes its own products: matrix products,
convolutions, attention kernels. They become those of the whole model, each counted once, in two ways:

1. What is computed again for the backward pass (``torch.utils.checkpoint``) is left out where it happens. So are the scores
   that attention kernels recompute: the backward pass of an attention is four products, whatever the kernel.
2. What several ranks of a model-parallel block (tp, cp, pp) compute alike (a router that tensor parallelism does not split, the
   rotary angles of each pipeline stage) is found by its numbers: products of the same shapes whose factors have the same norms.
   This asks no plan, and is right for any. A factor of zeros (a weight that begins so) proves nothing: its products count on
   each rank.

Only experts that ran are counted, and a product of no rows counts nothing. Two accountings: full attention, where every query
sees every key, and causal, which is half of that.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry

from kenotron.parallel._torch import TorchDispatchMode, is_in_backward


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of a step.

    Args:
        attention: of products of queries, keys and values, where every query sees every key. other: all else.
    """

    attention: float = 0.0
    other: float = 0.0

    @property
    def full(self) -> float:
        """FLOPs with full attention."""
        return self.other + self.attention

    @property
    def causal(self) -> float:
        """FLOPs with causal attention: half the queries and keys."""
        return self.other + self.attention / 2


class Product(NamedTuple):
    """One product that a rank computed."""

    kind: str  #: the operator and the shapes that it was given
    flops: float
    is_attention: bool
    norms: tuple[float, ...] = ()  #: of its factors, where ranks are to be compared


class FlopCounter(TorchDispatchMode):
    """Notes what is multiplied while it is switched on (``with FlopCounter() as counter``, or :meth:`start` and :meth:`stop`).

    Compiled functions run uncompiled in the meantime.

    Args:
        lengths: of the sequences, by which the products of an attention are known that no kernel computes as a whole.
        compare: note the norms of factors too, by which :func:`of_block` finds what several ranks compute alike.
        skip: functions whose products are not the model's (those of a pipeline's probe for shapes).
    """

    supports_higher_order_operators = True  # flex_attention is one
    running: ClassVar[list[FlopCounter]] = []

    def __init__(self, lengths: Collection[int] = (), *, compare: bool = False, skip: Iterable[Any] = ()) -> None:
        super().__init__()
        self.is_paused = False
        self.unknown: set[str] = set()  #: operators that are products but came in a form that no formula knows
        self._lengths, self._compare = frozenset(lengths), compare
        self._skip = {function.__code__ for function in skip}
        self._products: list[Product] = []
        self._norms: list[list[Tensor]] = []
        self._stance: Any = None

    def start(self) -> Self:
        """Begin to count."""
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        self.__enter__()
        return self

    def stop(self) -> None:
        """Stop counting. Whatever was switched on since :meth:`start` must be off again."""
        self.__exit__(None, None, None)
        self._stance.__exit__(None, None, None)

    def __enter__(self) -> Self:
        self.running.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.running.remove(self)

    @contextlib.contextmanager
    def attention(self, q: Tensor, k: Tensor, v: Tensor, keys: int, *, backward: bool) -> Iterator[None]:
        """See :func:`as_attention`."""
        was_paused, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = was_paused
        if not was_paused and not self._is_extra(sys._getframe(1)):
            products = 2 if backward else 1
            self._note("attention", products * _of_pairs(q.shape[0] * q.shape[2] * keys, q.shape[1], q, v), True, [q, k, v])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.is_paused:
            name = func.name().partition(".")[0].removeprefix("aten::")
            try:
                flops, is_attention = self._count(name, args, out)
            except (AttributeError, IndexError, TypeError, ValueError):  # a step must not fail because it is counted
                self.unknown.add(name)
                return out
            if flops and not self._is_extra(sys._getframe(1)):
                self._note(name, flops, is_attention, [arg for arg in args if isinstance(arg, Tensor)])
        return out

    def _is_extra(self, frame: FrameType) -> bool:
        if is_in_backward():
            return _is_recomputed(frame)
        return bool(self._skip) and not torch.is_grad_enabled() and any(f.f_code in self._skip for f in _callers(frame))

    def _count(self, name: str, args: tuple[Any, ...], out: Any) -> tuple[float, bool]:
        """Return FLOPs, and whether they are those of an attention."""
        if name in _MATRICES:
            batch, rows, inner, columns = _MATRICES[name](args)
            is_attention = name in _BATCHED and sum(size in self._lengths for size in (rows, inner, columns)) >= 2
            return 2.0 * batch * rows * inner * columns, is_attention
        if "attention" in name or "flash_attn" in name:
            return _attention(name, args), True
        formula = _OTHERS.get(name)
        return (0.0 if formula is None else float(formula(*args, out_val=out))), False

    def _note(self, name: str, flops: float, is_attention: bool, factors: list[Tensor]) -> None:
        shares = [factor.device_mesh.size() for factor in factors if isinstance(factor, DTensor)]
        if shares:  # of which every rank of the mesh sees the whole
            flops /= shares[0]
        elif self._compare:
            floats = [factor.detach() for factor in factors if factor.is_floating_point()]
            floats = floats[1:3] if name.startswith(("addmm", "baddbmm")) else floats[:3]
            self._norms.append([torch.linalg.vector_norm(factor, dtype=torch.float64) for factor in floats])
        shapes = ",".join("x".join(map(str, factor.shape)) for factor in factors)
        self._products.append(Product(f"{name} {shapes}", flops, is_attention))

    def products(self) -> list[Product]:
        """Return what was counted so far. With ``compare`` the host waits for the device."""
        if len(self._norms) != len(self._products):  # of DTensors there are none
            return self._products
        norms = iter(torch.stack(list(chain(*self._norms))).tolist() if self._norms else ())
        # As many digits as ranks agree on whose kernels add up in no fixed order.
        found = [tuple(float(f"{next(norms):.8e}") for _ in factors) for factors in self._norms]
        return [product._replace(norms=own) for product, own in zip(self._products, found, strict=True)]


def as_attention(q: Tensor, k: Tensor, v: Tensor, keys: int, *, backward: bool = False) -> AbstractContextManager[None]:
    """Let what an attention of one's own computes count as an attention kernel: all queries by all keys, whatever tiles ran.

    Args:
        q, k, v: [batch, heads, sequence, dim]. keys: that the queries may see, on all ranks. backward: of it.
    """
    if not FlopCounter.running:
        return contextlib.nullcontext()
    return FlopCounter.running[-1].attention(q, k, v, keys, backward=backward)


def total(products: Iterable[Product]) -> Flops:
    """Return the FLOPs of one rank's products."""
    found = {True: 0.0, False: 0.0}
    for product in products:
        found[product.is_attention] += product.flops
    return Flops(attention=found[True], other=found[False])


def of_block(products: Sequence[Product], groups: Iterable[dist.ProcessGroup]) -> list[Product]:
    """Return what the ranks of a model-parallel block multiply, what several of them compute alike once. All of them call it.

    Args:
        products: this rank's. groups: those of the block's axes (tp, cp, pp) that this rank is in.
    """
    for group in groups:
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, list(products), group=group)
        products = distinct(found)
    return list(products)


def distinct(of_ranks: Sequence[Sequence[Product]]) -> list[Product]:
    """Return the products of several ranks: those of the same numbers as often as the rank that has most of them."""
    alike: Counter[Product] = Counter()
    apart: list[Product] = []
    for products in of_ranks:
        comparable = [product for product in products if product.norms and all(map(_tells, product.norms))]
        apart += [product for product in products if not (product.norms and all(map(_tells, product.norms)))]
        alike |= Counter(comparable)
    return [*alike.elements(), *apart]


def _tells(value: float) -> bool:
    return value != 0.0 and math.isfinite(value)


# ---- Formulas -------------------------------------------------------------------------------------------------------


def _mm(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    return 1, a.shape[0], a.shape[1], b.shape[1]


def _bmm(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    return a.shape[0], a.shape[1], a.shape[2], b.shape[2]


def _grouped(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """Sizes of torch's grouped product: with one matrix of two dimensions its rows (or columns) are dealt out to the groups."""
    if a.ndim == b.ndim == 3:
        return _bmm(a, b)
    return 1, a.shape[-2], a.shape[-1], b.shape[-1]


#: operator -> (batch, rows, inner, columns) of its arguments
_MATRICES: dict[str, Callable[[tuple[Any, ...]], tuple[int, int, int, int]]] = {
    "mm": lambda args: _mm(*args[:2]),
    "addmm": lambda args: _mm(*args[1:3]),
    "addmm_": lambda args: _mm(*args[1:3]),
    "bmm": lambda args: _bmm(*args[:2]),
    "baddbmm": lambda args: _bmm(*args[1:3]),
    "baddbmm_": lambda args: _bmm(*args[1:3]),
    "_grouped_mm": lambda args: _grouped(*args[:2]),
    "_scaled_mm": lambda args: _mm(*args[:2]),
    "_scaled_grouped_mm": lambda args: _grouped(*args[:2]),
}
_BATCHED = ("bmm", "baddbmm", "baddbmm_")

#: What torch's own counter knows besides: convolutions.
_OTHERS = {str(op).removeprefix("aten."): formula for op, formula in flop_registry.items() if "conv" in str(op)}


def _attention(name: str, args: tuple[Any, ...]) -> float:
    """Return the FLOPs of an attention kernel: 2 products forward, 4 backward."""
    is_backward = "backward" in name
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # All take the gradient of the output first, but for flex_attention.
    q, k, v = tensors[1:4] if is_backward and not name.startswith("flex") else tensors[:3]
    pairs = _pairs_of_documents(tensors) if q.ndim == 3 else None
    if pairs is not None:
        heads = q.shape[1]
    else:
        heads_first = "scaled_dot_product" in name or name.startswith("flex")
        heads, length, keys = (q.shape[1], q.shape[2], k.shape[2]) if heads_first else (q.shape[2], q.shape[1], k.shape[1])
        pairs = q.shape[0] * length * keys
    return _of_pairs(pairs, heads, q, v) * (2 if is_backward else 1)


def _of_pairs(pairs: int, heads: int, q: Tensor, v: Tensor) -> float:
    return 2.0 * pairs * heads * (q.shape[-1] + v.shape[-1])


def _pairs_of_documents(tensors: Sequence[Tensor]) -> int | None:
    """Return how many queries and keys lie in the same documents, of a kernel that is told where each begins."""
    begins = [t for t in tensors if t.ndim == 1 and not t.is_floating_point() and t.numel() > 1][:2]
    if len(begins) < 2:
        return None
    queries, keys = (t.diff().tolist() for t in begins)
    return sum(q * k for q, k in zip(queries, keys, strict=True))


# ---- Recomputation --------------------------------------------------------------------------------------------------

_ENGINE = torch.autograd.graph.__file__


def _is_recomputed(frame: FrameType) -> bool:
    """Whether the innermost caller of note, within a backward pass, is a checkpoint that runs forward again."""
    for caller in _callers(frame):
        file = caller.f_code.co_filename
        if file == _ENGINE:
            return False
        if file.endswith(("checkpoint.py", "checkpointing.py")):
            return True
    return False


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
