"""Values that only pickle can hold: the memory of their tensors lies in the shards, copied as that of all other tensors is.

A pickle names each storage, as ``torch.save`` does, so that views and shared memory come back as they were. A parameter that
the checkpoint holds anyway (a module among the hyper-parameters may be part of the model) is named instead of stored again.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.storage import TypedStorage

_STORAGE, _PARAMETER = "storage", "parameter"


def dump(value: Any, add_tensor: Callable[[torch.Tensor], str], stored: Mapping[int, str]) -> bytes:
    """Return the pickle of a value.

    Args:
        add_tensor: takes a storage's bytes and returns the name that they are stored under.
        stored: by ``id``, the parameters that the checkpoint holds whole, and their names there.

    Raises:
        Exception: whatever the value's own code raises.
    """
    file = io.BytesIO()
    _Pickler(file, add_tensor, stored).dump(value)
    return file.getvalue()


def load(data: bytes, load_tensor: Callable[[str], torch.Tensor]) -> Any:
    """Return the value of a pickle, with its tensors on the CPU. Runs code that the pickle names.

    Args:
        load_tensor: returns a tensor by the name that it is stored under.
    """
    return _Unpickler(io.BytesIO(data), load_tensor).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, add_tensor: Callable[[torch.Tensor], str], stored: Mapping[int, str]) -> None:
        super().__init__(file)
        self._add_tensor, self._stored = add_tensor, stored
        self._names: dict[int, str] = {}  # by address, of what has been seen

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter) and id(obj) in self._stored:
            return _PARAMETER, self._stored[id(obj)], obj.requires_grad
        if isinstance(obj, TypedStorage):
            return _STORAGE, self._name_of(obj._untyped_storage), obj.dtype
        if isinstance(obj, torch.UntypedStorage):
            return _STORAGE, self._name_of(obj), None
        return None

    def _name_of(self, storage: torch.UntypedStorage) -> str | None:
        if not storage.nbytes():
            return None
        address = storage.data_ptr()
        if address not in self._names:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
            self._names[address] = self._add_tensor(flat.set_(storage))
        return self._names[address]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, load_tensor: Callable[[str], torch.Tensor]) -> None:
        super().__init__(file)
        self._load_tensor = load_tensor
        self._found: dict[str, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, name, detail = pid
        if kind == _PARAMETER:
            if name not in self._found:
                self._found[name] = nn.Parameter(self._load_tensor(name), requires_grad=detail)
            return self._found[name]
        if kind != _STORAGE:
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r:.80}")
        if name is None:
            storage = torch.UntypedStorage(0)
        else:
            storage = self._found.setdefault(name, None) or self._load_tensor(name).untyped_storage()
            self._found[name] = storage
        return storage if detail is None else TypedStorage(wrap_storage=storage, dtype=detail, _internal=True)
