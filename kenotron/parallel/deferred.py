"""Tensors whose values are computed later: what is done to them on the meta device is recorded, and replayed when asked for.

1. Inside of a `recording` whatever torch would allocate on the CPU lies on the meta device. Its storage carries a `Memory`.
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
import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kenotron.parallel._torch import TorchDispatchMode, device_constructors, without_functions

_MEMORY = "_kenotron_memory"
_COPIED_BYTES = 2**20  # real tensors up to here are copied when they are recorded; larger ones only if they change

#: They write all elements of their first argument and read none of them.
_OVERWRITING = frozenset(
    ("copy_", "fill_", "zero_", "uniform_", "normal_", "log_normal_", "exponential_", "geometric_", "cauchy_", "random_")
)
#: They ask for values, and what they return is real.
_VALUE_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_IS_META, _DEVICE = Tensor.is_meta.__get__, Tensor.device.__get__  # type: ignore[attr-defined]

_orders = itertools.count()


class Source(Protocol):
    """Where stored values of one tensor lie."""

    def read(self, offset: tuple[int, ...], into: Tensor) -> None:
        """Fill ``into`` with the box of the tensor that begins at ``offset``."""


@dataclass(eq=False)
class Memory:
    """The memory of a storage on the meta device, and what was written to it, in order."""

    num_bytes: int
    writes: list[_Operation] = field(default_factory=list)


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
        memory = _memory_of(tensor)
        if memory is None:
            return None
        return Place(memory, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())

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
class _Constant:
    """A real tensor that was an argument, as it was then."""

    tensor: Tensor
    version: int | None = None  # where it is not a copy

    def value(self) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise ValueError(
                f"a tensor of the shape {list(self.tensor.shape)} that configure_model copied into a weight was changed after "
                "configure_model, before the weight was made from it. Copy a clone() of it, or change it no more."
            )
        return self.tensor


@dataclass(eq=False)
class _Operation:
    """A recorded operator.

    ``args`` and ``kwargs`` hold a `Place` or a `_Constant` for each tensor. ``outputs`` are places in new memories, or ``None``
    for results that are aliases. ``state`` is the generator's before random numbers.
    """

    order: int
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[Place | None, ...] = ()
    overwrites: Memory | None = None
    generator: torch.Generator | None = None
    state: Tensor | None = None
    source: Source | None = None

    @property
    def reads(self) -> list[Memory]:
        places = (leaf for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Place))
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


def _needed(memories: Iterable[Memory]) -> list[_Operation]:
    """Return the operations that give memories their last values, in order."""
    pending = [(memory, math.inf) for memory in memories]
    covered: dict[Memory, float] = {}
    found: dict[int, _Operation] = {}
    while pending:
        memory, before = pending.pop()
        done = covered.get(memory, -1)
        if done >= before:
            continue
        covered[memory] = before
        stop = bisect.bisect_left(memory.writes, before, key=lambda operation: operation.order)
        for operation in reversed(memory.writes[:stop]):
            if operation.order < done:
                break
            if operation.order not in found:
                found[operation.order] = operation
                pending += [(other, operation.order) for other in operation.reads if other is not memory]
            if operation.overwrites is memory:
                break
    return [found[order] for order in sorted(found)]


def _run(operation: _Operation, real: dict[Memory, torch.UntypedStorage]) -> None:
    if operation.source is not None:
        (place,) = operation.outputs
        assert place is not None
        operation.source.read((0,) * len(place.shape), _tensor(place, real))
        return

    def at_hand(leaf: Any) -> Any:
        if isinstance(leaf, Place):
            return _tensor(leaf, real)
        return leaf.value() if isinstance(leaf, _Constant) else leaf

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
    return torch.empty(0, dtype=place.dtype).set_(real[place.memory], place.offset, place.shape, place.stride)  # type: ignore[call-overload,no-any-return]


def _written(operation: _Operation) -> list[Memory]:
    return [place.memory for place in operation.outputs if place is not None]


# ---- Recording --------------------------------------------------------------------------------------------------------


def record_source(tensor: Tensor, source: Source) -> None:
    """Note that a tensor on the meta device gets its values, all of them, from where they are stored."""
    place = Place.of(tensor)
    if place is None:
        memory = Memory(tensor.untyped_storage().nbytes())
        tensor.untyped_storage().__dict__[_MEMORY] = memory
        place = Place.of(tensor)
        assert place is not None
    is_whole = tensor.numel() * tensor.element_size() == place.memory.num_bytes
    operation = _Operation(next(_orders), record_source, (), {}, (place,), place.memory if is_whole else None, source=source)
    place.memory.writes.append(operation)


_active: ContextVar[_Operators | None] = ContextVar("_active", default=None)


def is_recording() -> bool:
    """Return whether this runs inside of a `recording`."""
    return _active.get() is not None


@contextlib.contextmanager
def recording(dtype: torch.dtype | None = None, *, draw: bool = True) -> Iterator[None]:
    """Let new tensors lie on the meta device, and record what becomes of them.

    Args:
        dtype: torch's default one, inside.
        draw: let random operators move the generator, which takes the time that their numbers take. Without, random numbers are
            not those that a program without a recording would have: for what will get stored values, or none.
    """
    before, outer = torch.get_default_dtype(), _active.get()
    torch.set_default_dtype(dtype or before)
    try:
        if outer is not None:
            outer.draw, drew = outer.draw and draw, outer.draw
            try:
                yield
            finally:
                outer.draw = drew
            return
        operators = _Operators(draw)
        token = _active.set(operators)
        try:
            with operators, _Functions(operators), _load_state_dict_works():
                yield
        finally:
            _active.reset(token)
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _load_state_dict_works() -> Iterator[None]:
    """Silence its warning that it does nothing on the meta device, which here is not so."""
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter in the checkpoint to a meta")
    added = warnings.filters[0]
    try:
        yield
    finally:
        if added in warnings.filters:
            warnings.filters.remove(added)  # type: ignore[attr-defined]


class _Operators(TorchDispatchMode):
    """Records operators, below autograd."""

    def __init__(self, draw: bool) -> None:
        super().__init__()
        self.draw = draw
        self._is_paused = False
        self._scratch = torch.UntypedStorage(0)
        self._held: dict[int, list[_Constant]] = {}  # constants that are no copies, by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        with without_functions():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = _tensors((args, kwargs))
        recorded = [tensor for tensor in tensors if _memory_of(tensor) is not None]
        if recorded:
            return self._on_recorded(func, args, kwargs)
        if not tensors and _makes_on_cpu(func, kwargs):
            made = self._record(func, args, {**kwargs, "device": torch.device("meta"), **_unpinned(kwargs)}, kwargs)
            if all(tensor.numel() for tensor in _tensors(made)):
                return made
        self._keep(func, args, kwargs)
        if any(tensor.is_meta for tensor in _mutated(func, args, kwargs)):
            raise _not_recorded(next(tensor for tensor in tensors if tensor.is_meta))
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Compute for real."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _on_recorded(self, func: Any, args: Any, kwargs: Any) -> Any:
        mutated = _mutated(func, args, kwargs)
        changes_real = any(_memory_of(tensor) is None for tensor in mutated)
        if changes_real or any(tag in func.tags for tag in _VALUE_TAGS):
            return self._now(func, args, kwargs)
        if "device" in kwargs:  # wherever it was to go, it is not there yet
            kwargs = {**kwargs, "device": torch.device("meta"), **_unpinned(kwargs)}
        try:
            return self._record(func, args, kwargs, kwargs)
        except NotImplementedError:  # no operator of the meta device: its shapes are not known
            if mutated:
                self._note(func, args, kwargs, [])
                return mutated[0]
            return self._now(func, args, kwargs)

    def _now(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute what an operator needs, and run it."""
        found = [(leaf, place) for leaf in _tensors((args, kwargs)) if (place := Place.of(leaf)) is not None]
        real = dict(zip([id(leaf) for leaf, _ in found], values([place for _, place in found]), strict=True))
        args, kwargs = tree_map(lambda leaf: real.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        if "device" in kwargs and torch.device(kwargs["device"]).type == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        self._keep(func, args, kwargs)
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any, given: Any) -> Any:
        """Run an operator on the meta device, which tells shapes, and record it where it writes."""
        to_meta = tree_map(lambda leaf: _to_meta(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors(to_meta)}
        result = func(*to_meta[0], **to_meta[1])
        made = _tensors(result)
        fresh = [tensor if tensor.untyped_storage()._cdata not in known else None for tensor in made]
        if any(tensor is not None for tensor in fresh) or _mutated(func, args, kwargs):
            if all(tensor is None or tensor.numel() for tensor in fresh):
                self._note(func, args, given, fresh)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, fresh: Sequence[Tensor | None]) -> None:
        mutated = _mutated(func, args, kwargs)
        generator, state = self._move_generator(func, args, kwargs, fresh)
        for tensor in fresh:
            if tensor is not None and _memory_of(tensor) is None:
                tensor.untyped_storage().__dict__[_MEMORY] = Memory(tensor.untyped_storage().nbytes())
        outputs = tuple(None if tensor is None else Place.of(tensor) for tensor in fresh)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        name = func.overloadpacket.__name__
        if name.startswith(("empty", "new_empty")):
            return  # nothing is written
        whole = None
        if name in _OVERWRITING:
            place = Place.of(mutated[0])
            assert place is not None
            if math.prod(place.shape) * place.dtype.itemsize == place.memory.num_bytes:
                whole = place.memory
        args, kwargs = tree_map(lambda leaf: self._kept(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        if whole is not None and any(isinstance(x, Place) and x.memory is whole for x in _leaves((args[1:], kwargs))):
            whole = None
        operation = _Operation(next(_orders), func, args, kwargs, outputs, whole, generator, state)
        written = [place.memory for place in outputs if place is not None]
        written += [memory for tensor in mutated if (memory := _memory_of(tensor)) is not None]
        for memory in dict.fromkeys(written):
            memory.writes.append(operation)

    def _kept(self, tensor: Tensor) -> Place | _Constant:
        place = Place.of(tensor)
        if place is not None:
            return place
        if tensor.is_meta:
            raise _not_recorded(tensor)
        if tensor.numel() * tensor.element_size() <= _COPIED_BYTES:
            return _Constant(tensor.detach().clone())
        constant = _Constant(tensor, tensor._version)
        self._held.setdefault(tensor.untyped_storage()._cdata, []).append(constant)
        return constant

    def _keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copy recorded real tensors that are about to change."""
        if not self._held or not func._schema.is_mutable:
            return
        for tensor in _mutated(func, args, kwargs):
            for constant in self._held.pop(tensor.untyped_storage()._cdata, ()):
                constant.tensor, constant.version = constant.value().clone(), None

    def _move_generator(
        self, func: Any, args: Any, kwargs: Any, fresh: Sequence[Tensor | None]
    ) -> tuple[torch.Generator | None, Tensor | None]:
        """Draw the numbers of a random operator; return the generator and its state before."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None, None
        generator = kwargs.get("generator") or torch.default_generator
        state = generator.get_state()
        if not self.draw:
            return generator, state
        own = _mutated(func, args, kwargs)
        places = [Place.of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and all(t is not o for o in own)]
        real = iter(values([place for place in places if place is not None]))

        def at_hand(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or Place.of(leaf) is None:
                return leaf
            return self._scratch_like(leaf) if any(leaf is each for each in own) else next(real)

        args, kwargs = tree_map(at_hand, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        func(*args, **kwargs)
        return generator, state

    def _scratch_like(self, tensor: Tensor) -> Tensor:
        """Return memory in the form of a tensor, the same again and again."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if self._scratch.nbytes() < extent * tensor.element_size():
            self._scratch = torch.UntypedStorage(extent * tensor.element_size())
        return torch.empty(0, dtype=tensor.dtype).set_(self._scratch, 0, tensor.shape, tensor.stride())  # type: ignore[call-overload,no-any-return]


class _Functions(TorchFunctionMode):
    """What operators do not tell: recorded tensors pretend to be on the CPU, and have values for code that is not torch's."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) and Place.of(args[0]) is not None else None
        if func in device_constructors():
            return self._construct(func, args, kwargs, first)
        if first is None:
            return func(*args, **kwargs)
        if func == _IS_META:  # initialisers do nothing on the meta device, where nothing can be done
            return False
        if func == _DEVICE:
            return torch.device("cpu")
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": first.dtype, **kwargs, "device": torch.device("cpu")})
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__):
            return self._leave(func, first, args[1:], kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return first
        if func is Tensor.to:
            args, kwargs = _without_device(args, kwargs)
        return func(*args, **kwargs)

    def _construct(self, func: Any, args: Any, kwargs: Any, first: Tensor | None) -> Any:
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            if first is not None:
                made = first.detach() if func is torch.tensor else first
                made = made.to(kwargs.get("dtype") or first.dtype, copy=func is torch.tensor)
                return made.requires_grad_() if kwargs.get("requires_grad") else made
            args = (self._with_values(args[0]), *args[1:]) if args else args
            if device is not None and torch.device(device).type == "meta":
                kwargs = {**kwargs, "device": torch.device("cpu")}  # the meta device would lose what it is made of
        return func(*args, **kwargs)

    def _with_values(self, data: Any) -> Any:
        """Return (nested) lists with numbers in the place of recorded tensors."""
        if isinstance(data, list | tuple):
            return [self._with_values(each) for each in data]
        is_recorded = isinstance(data, Tensor) and Place.of(data) is not None
        return self._leave(Tensor.tolist, data, (), {}) if is_recorded else data

    def _leave(self, func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        """Compute a tensor, for code that is not torch's."""
        place = Place.of(tensor)
        assert place is not None
        with self._operators.paused():
            value = place.value()
            result = func(value, *args, **kwargs)
        if isinstance(result, np.ndarray):
            result.flags.writeable = False  # what is written there would not come back
        return result


def _without_device(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of ``Tensor.to`` without a device: to where a tensor goes that lies nowhere yet says nothing."""
    named = [*args[1:], kwargs.get("dtype"), kwargs.get("other")]
    dtypes = [arg.dtype if isinstance(arg, Tensor) else arg for arg in named if isinstance(arg, torch.dtype | Tensor)]
    flags = [arg for arg in args[1:] if isinstance(arg, bool)]  # non_blocking, copy
    copy = kwargs.get("copy", flags[1] if len(flags) == 2 else False)
    kept = {"memory_format": kwargs["memory_format"]} if "memory_format" in kwargs else {}
    return (args[0], dtypes[0] if dtypes else args[0].dtype), {"copy": copy, **kept}


def _not_recorded(tensor: Tensor) -> ValueError:
    return ValueError(
        f"configure_model computes with a tensor of the shape {list(tensor.shape)} on the meta device that was made before it: "
        "it has no values. Make it inside of configure_model, or in __init__ without the meta device."
    )


# ---- Small things -----------------------------------------------------------------------------------------------------


def _memory_of(tensor: Tensor) -> Memory | None:
    with without_functions():
        if not tensor.is_meta or tensor.layout is not torch.strided or isinstance(tensor, DTensor):
            return None
        memory: Memory | None = tensor.untyped_storage().__dict__.get(_MEMORY)
        return memory


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.ndim == 0:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _makes_on_cpu(func: Any, kwargs: Any) -> bool:
    if all(argument.name != "device" for argument in func._schema.arguments) or func is torch.ops.aten.from_file.default:
        return False
    return torch.device(kwargs.get("device") or "cpu").type in ("cpu", "meta")


def _unpinned(kwargs: Any) -> dict[str, Any]:
    return {"pin_memory": False} if kwargs.get("pin_memory") else {}


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree, is_leaf=lambda node: isinstance(node, Place))


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    return tree_map(fn, tree, is_leaf=lambda node: isinstance(node, Place))
