"""What a checkpoint holds, read when it is touched: for hooks that rename, drop or edit what is to be loaded.

A `LazyTensor` is a tensor whose elements are read from the checkpoint by the first operation on it. Whoever only moves it from
one key to another costs nothing, and whoever loads it afterwards (``LazyTensor.stored``) can read just the part that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class _Cell:
    """The one place where a tensor's elements are kept, for all that stand for it."""

    def __init__(self, name: str, load: Callable[[], torch.Tensor]) -> None:
        self.name, self.load = name, load
        self.value: torch.Tensor | None = None


class LazyTensor(torch.Tensor):
    """A tensor on the CPU that is read when it is touched.

    Args:
        name: that it is stored under. shape, dtype: as it is stored. load: reads it.
    """

    _cell: _Cell
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> LazyTensor:
        return LazyTensor._of(_Cell(name, load), shape, dtype)

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @staticmethod
    def _of(cell: _Cell, shape: Any, dtype: torch.dtype) -> LazyTensor:
        cpu = torch.device("cpu")
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(LazyTensor, shape, dtype=dtype, device=cpu)
        made._cell = cell
        return made

    @property
    def stored(self) -> str:
        """The name that it is stored under."""
        return self._cell.name

    @property
    def is_untouched(self) -> bool:
        """Whether it is still what the checkpoint holds."""
        return self._cell.value is None

    def read(self) -> torch.Tensor:
        """Return the plain tensor, the same one each time."""
        if self._cell.value is None:
            self._cell.value = self._cell.load()
        return self._cell.value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # what `nn.Parameter` is made of must be of the same type
            return cls._of(args[0]._cell, args[0].shape, args[0].dtype)
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        return self.read().data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.read().data = value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.read())


def _forward(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.read(), name)(*args, **kwargs)

    return method


#: What reaches a tensor's memory without an operation.
for _name in (
    *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "__array__", "__reduce_ex__", "__deepcopy__", "__dlpack__"),
    *("is_shared", "share_memory_", "pin_memory"),
):
    setattr(LazyTensor, _name, _forward(_name))


class LazyList(list[Any]):
    """A list whose items are read when any of them is asked for."""

    def __init__(self, load: Callable[[], list[Any]]) -> None:
        super().__init__()
        self._load: Callable[[], list[Any]] | None = load

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has looked at it."""
        return self._load is not None

    def _fill(self) -> None:
        if self._load is not None:
            load, self._load = self._load, None
            self[:] = load()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:
        self._fill()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self._fill()
        return super().__getitem__(index)
