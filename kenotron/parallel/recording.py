"""The recording of operators, for tensors whose values are computed later (``deferred``).

Two modes of torch do it: `_Operators` sees every operator, below autograd, and `_Functions` what is no operator.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kenotron.parallel._torch import TorchDispatchMode, device_constructors, without_functions
from kenotron.parallel.deferred import Constant, Operation, Place, leaves, memory_of, remember, values

_COPIED_BYTES = 2**20  # real tensors up to here are copied when they are recorded; larger ones only if they change

#: They write all elements of their first argument and read none of them.
_OVERWRITING = frozenset(
    ("copy_", "fill_", "zero_", "uniform_", "normal_", "log_normal_", "exponential_", "geometric_", "cauchy_", "random_")
)
#: They ask for values, and what they return is real.
_VALUE_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_IS_META, _SET_DATA = Tensor.is_meta.__get__, Tensor.data.__set__  # type: ignore[attr-defined]


_active: ContextVar[_Operators | None] = ContextVar("_active", default=None)


def is_recording() -> bool:
    """Return whether this runs inside of a `recording`."""
    return _active.get() is not None


@contextlib.contextmanager
def recording(dtype: torch.dtype | None = None, *, draw: bool = True) -> Iterator[None]:
    """Let new tensors lie on the meta device, and record what becomes of them.

    Args:
        dtype: torch's default one, inside.
        draw: let random operators move the generator, which takes the time that their numbers take. Without, each operator has
            a seed of its own, and random numbers are not those that a program without a recording would have: for what will get
            stored values, or none.
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
        self._num_undrawn = 0
        self._scratch = torch.UntypedStorage(0)
        self._held: dict[int, list[Constant]] = {}  # constants that are no copies, by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        with without_functions():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = _tensors((args, kwargs))
        recorded = [tensor for tensor in tensors if memory_of(tensor) is not None]
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
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _on_recorded(self, func: Any, args: Any, kwargs: Any) -> Any:
        mutated = _mutated(func, args, kwargs)
        changes_real = any(memory_of(tensor) is None for tensor in mutated)
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
        changed = [tensor for tensor in _mutated(func, args, kwargs) if id(tensor) in real]
        args, kwargs = tree_map(lambda leaf: real.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        if "device" in kwargs and torch.device(kwargs["device"]).type == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        self._keep(func, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in changed:  # beside real ones, in a list
            self._record(torch.ops.aten.copy_.default, (tensor, real[id(tensor)]), {}, {})
        return result

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
            if tensor is not None and memory_of(tensor) is None:
                remember(tensor)
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
        if whole is not None and any(isinstance(x, Place) and x.memory is whole for x in leaves((args[1:], kwargs))):
            whole = None
        operation = Operation(func, args, kwargs, outputs, whole, generator, state)
        written = [place.memory for place in outputs if place is not None]
        written += [memory for tensor in mutated if (memory := memory_of(tensor)) is not None]
        for memory in dict.fromkeys(written):
            memory.writes.append(operation)

    def _kept(self, tensor: Tensor) -> Place | Constant:
        place = Place.of(tensor)
        if place is not None:
            return place
        if tensor.is_meta:
            raise _not_recorded(tensor)
        if tensor.numel() * tensor.element_size() <= _COPIED_BYTES:
            return Constant(tensor.detach().clone())
        constant = Constant(tensor, tensor._version)
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
        if not self.draw:  # others each time all the same: who draws until all numbers are in a range must come to an end
            self._num_undrawn += 1
            seed = (generator.initial_seed() + self._num_undrawn * 0x9E3779B97F4A7C15) % 2**63
            return generator, torch.Generator(generator.device).manual_seed(seed).get_state()
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
        return torch.empty(0, dtype=tensor.dtype).set_(self._scratch, 0, tensor.shape, tensor.stride())


class _Functions(TorchFunctionMode):
    """What operators do not tell: recorded tensors do not tell that they are on the meta device, and have values for all."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) and Place.of(args[0]) is not None else None
        if func == _SET_DATA:
            return func(args[0], self._alike(args[1], first))
        if func in device_constructors():
            return self._construct(func, args, kwargs, first)
        if first is None:
            return func(*args, **kwargs)
        if func == _IS_META:  # initialisers do nothing on the meta device, where nothing can be done
            return False
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": first.dtype, **kwargs, "device": torch.device("cpu")})
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__):
            return self._leave(func, first, args[1:], kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return first
        if func is Tensor.to:
            args, kwargs = _without_device(args, kwargs)
        return func(*args, **kwargs)

    def _alike(self, value: Tensor, first: Tensor | None) -> Tensor:
        """Return a tensor that can take the place of another one's ``data``: recorded or real, as that is."""
        place = Place.of(value)
        if first is not None and place is None and not value.is_meta:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return made.copy_(value.detach())
        if first is None and place is not None:
            with self._operators.paused():
                return place.value()
        return value

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
        elif device is not None and torch.device(device).type != "meta":
            with self._operators.paused():  # whoever names a device may fill the memory by other means than operators
                return func(*args, **kwargs)
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
