"""Tensors whose values are computed later: what is done to them on the meta device is recorded, and replayed when asked for.

1. Inside of a ``recording`` whatever torch would allocate on the CPU lies on the meta device. Its storage carries a `Memory`.
2. Every operator that writes to such a memory is recorded with its arguments, as places in memories or as real tensors.
   Views, ``.data`` and ``detach`` need no record: they are other places in the same memory.
3. Random operators draw their numbers at once, which moves the generator as it would be moved without a recording. The
   numbers are thrown away; the generator's state before them is kept, from which the replay draws them again.
4. What depends on values (``item()``, ``nonzero``, ``numpy()``) gets them: they are replayed at that moment.
5. `Place.value` replays what one tensor needs, in the order of recording, on the CPU. So it is what would have been computed
   without a recording, bit for bit, on every rank, and only one tensor and what it is made of are in memory.

Torchdistx had the idea first (``deferred_init``); there graphs are of tensors, here of memories, so that writes through views
need no care.
"""

from __future__ import annotations

import bisect
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from kenotron.parallel._torch import without_functions

_MEMORY = "_kenotron_memory"
_orders = itertools.count()


class Source(Protocol):
    """Where stored values of one tensor lie."""

    def read(self, offset: tuple[int, ...], into: Tensor) -> None:
        """Fill ``into`` with the box of the tensor that begins at ``offset``."""


@dataclass(eq=False)
class Memory:
    """The memory of a storage on the meta device, and what was written to it, in order."""

    num_bytes: int
    writes: list[Operation] = field(default_factory=list)


class Place(NamedTuple):
    """A tensor in a memory."""

    memory: Memory
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Place | None:
        """Return where a tensor on the meta device lies; ``None`` for all others, and for one that was not recorded."""
        memory = memory_of(tensor)
        if memory is None:
            return None
        return Place(memory, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    @property
    def is_written(self) -> bool:
        """Whether anything gave values to the memory."""
        return bool(self.memory.writes)

    @property
    def source(self) -> Source | None:
        """Where the values are stored, if that is all that became of the tensor: parts of it can then be read alone."""
        last = self.memory.writes[-1] if self.memory.writes else None
        is_plain = last is not None and last.source is not None and last.outputs[0] == self
        return last.source if last is not None and is_plain else None

    def value(self) -> Tensor:
        """Compute the tensor, on the CPU."""
        return values([self])[0]


@dataclass(eq=False)
class Constant:
    """A real tensor that was an argument, as it was then. ``version``: its own, unless it is a copy."""

    tensor: Tensor
    version: int | None = None

    def value(self) -> Tensor:
        """Return the tensor; ``ValueError`` where it was changed."""
        if self.version is not None and self.tensor._version != self.version:
            raise ValueError(
                f"a tensor of the shape {list(self.tensor.shape)} that configure_model copied into a weight was changed after "
                "configure_model, before the weight was made from it. Copy a clone() of it, or change it no more."
            )
        return self.tensor


@dataclass(eq=False)
class Operation:
    """A recorded operator.

    ``args`` and ``kwargs`` hold a `Place` or a `Constant` for each tensor. ``outputs`` are places in new memories, or ``None``
    for results that are aliases. ``state`` is the generator's before random numbers.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[Place | None, ...] = ()
    overwrites: Memory | None = None
    generator: torch.Generator | None = None
    state: Tensor | None = None
    source: Source | None = None
    order: int = field(default_factory=lambda: next(_orders))

    @property
    def reads(self) -> list[Memory]:
        """The memories whose values count."""
        places = (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Place))
        return [place.memory for place in places if place.memory is not self.overwrites]


# ---- Replay -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def values(places: Sequence[Place]) -> list[Tensor]:
    """Compute tensors on the CPU; those in the same memory share it."""
    needed = _needed([place.memory for place in places])
    last_use: dict[Memory, int] = {}
    for operation in needed:
        for memory in {*operation.reads, *_written(operation)}:
            last_use[memory] = operation.order
    kept = {place.memory for place in places}
    real: dict[Memory, torch.UntypedStorage] = {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for operation in needed:
            _run(operation, real)
            for memory in [m for m in real if last_use.get(m) == operation.order and m not in kept]:
                del real[memory]
        return [_tensor(place, real) for place in places]


def _needed(memories: Iterable[Memory]) -> list[Operation]:
    """Return the operations that give memories their last values, in order."""
    pending = [(memory, math.inf) for memory in memories]
    walked: set[tuple[Memory, int]] = set()
    found: dict[int, Operation] = {}
    while pending:
        memory, before = pending.pop()
        stop = bisect.bisect_left(memory.writes, before, key=lambda operation: operation.order)
        for operation in reversed(memory.writes[:stop]):
            if (memory, operation.order) in walked:  # and so on to what it overwrites
                break
            walked.add((memory, operation.order))
            if operation.order not in found:
                found[operation.order] = operation
                pending += [(other, operation.order) for other in operation.reads if other is not memory]
            if operation.overwrites is memory:
                break
    return [found[order] for order in sorted(found)]


def _run(operation: Operation, real: dict[Memory, torch.UntypedStorage]) -> None:
    if operation.source is not None:
        (place,) = operation.outputs
        assert place is not None
        operation.source.read((0,) * len(place.shape), _tensor(place, real))
        return

    def at_hand(leaf: Any) -> Any:
        if isinstance(leaf, Place):
            return _tensor(leaf, real)
        return leaf.value() if isinstance(leaf, Constant) else leaf

    args, kwargs = _map(at_hand, (operation.args, operation.kwargs))
    if operation.generator is not None and operation.state is not None:
        if "generator" in kwargs and kwargs["generator"] is not None:
            kwargs = {**kwargs, "generator": torch.Generator().set_state(operation.state)}
        else:
            torch.set_rng_state(operation.state)
    results = [leaf for leaf in tree_leaves(operation.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for place, result in zip(operation.outputs, results, strict=True):
        if place is None:
            continue
        geometry = (tuple(result.stride()), result.storage_offset(), result.untyped_storage().nbytes())
        if geometry == (place.stride, place.offset, place.memory.num_bytes):
            real[place.memory] = result.untyped_storage()
        else:
            _tensor(place, real).copy_(result)


def _tensor(place: Place, real: dict[Memory, torch.UntypedStorage]) -> Tensor:
    if place.memory not in real:  # zeros: what nobody writes is the same on all ranks
        real[place.memory] = torch.zeros(place.memory.num_bytes, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=place.dtype).set_(real[place.memory], place.offset, place.shape, place.stride)


def _written(operation: Operation) -> list[Memory]:
    return [place.memory for place in operation.outputs if place is not None]


def fingerprint(place: Place) -> int:
    """Return a number that differs where a tensor was made otherwise: by other operators, random numbers or given ones.

    Of given numbers some are looked at.
    """
    found = 0
    for operation in _needed([place.memory]):
        found = zlib.crc32(getattr(operation.func, "__name__", "").encode(), found)
        given = [leaf.tensor for leaf in leaves((operation.args, operation.kwargs)) if isinstance(leaf, Constant)]
        for tensor in [*given, *([operation.state] if operation.state is not None else ())]:
            flat = tensor.detach().flatten()
            some = flat[:: max(1, flat.numel() // 1024)].cpu()
            found = zlib.crc32(str(some.tolist()).encode(), found)
    return found


def record_source(tensor: Tensor, source: Source) -> None:
    """Note that a tensor on the meta device gets its values, all of them, from where they are stored."""
    place = Place.of(tensor)
    if place is None:
        remember(tensor)
        place = Place.of(tensor)
        assert place is not None
    is_whole = tensor.numel() * tensor.element_size() == place.memory.num_bytes
    operation = Operation(record_source, (), {}, (place,), place.memory if is_whole else None, source=source)
    place.memory.writes.append(operation)


# ---- Small things -----------------------------------------------------------------------------------------------------


def memory_of(tensor: Tensor) -> Memory | None:
    """Return the memory that a tensor on the meta device lies in, if it was recorded."""
    with without_functions():
        if not tensor.is_meta or tensor.layout is not torch.strided or isinstance(tensor, DTensor):
            return None
        memory: Memory | None = tensor.untyped_storage().__dict__.get(_MEMORY)
        return memory


def remember(tensor: Tensor) -> None:
    """Record what becomes of a tensor on the meta device from now on."""
    storage = tensor.untyped_storage()
    storage.__dict__[_MEMORY] = Memory(storage.nbytes())


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, places among them."""
    return tree_leaves(tree, is_leaf=lambda node: isinstance(node, Place))


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    return tree_map(fn, tree, is_leaf=lambda node: isinstance(node, Place))
