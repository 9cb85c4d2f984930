"""What a batch of any structure holds: how many tokens, in sequences of which length."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_NAMES = ("input_ids", "tokens", "token_ids", "ids")


def amount_in(batch: Any, tokens_of: Callable[[Any], Any] | None = None) -> tuple[int, int | None, str]:
    """Return how much a batch holds, the length of its sequences if it has any, and the unit: ``"tokens"`` or ``"samples"``.

    Raises:
        ValueError: ``tokens_of`` returned no integer, or there is no tensor in the batch.
    """
    ids = _token_ids(batch)
    length = None if ids is None else ids.shape[-1]
    if tokens_of is not None:
        count = tokens_of(batch)
        if isinstance(count, Tensor) and count.device.type != "cpu":
            raise ValueError("tokens_of returned a tensor on a device, which the host would wait for. Return an int of shapes.")
        try:
            return operator.index(count), length, "tokens"
        except TypeError:
            raise ValueError(f"tokens_of returned {count!r}: return the number of tokens as an int.") from None
    if ids is not None:
        return ids.numel(), length, "tokens"
    for _, tensor in _tensors(batch, ""):
        if tensor.ndim:
            return tensor.shape[0], None, "samples"
    raise ValueError(f"a batch ({type(batch).__name__}) holds no tensor to count. Give Throughput tokens_of=….")


def _token_ids(batch: Any) -> Tensor | None:
    integers = [
        (name, tensor)
        for name, tensor in _tensors(batch, "")
        if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.ndim and str(tensor.dtype) != "torch.bool"
    ]
    for wanted in _NAMES:
        for name, tensor in integers:
            if name == wanted:
                return tensor
    # Two dimensions: labels of samples have one, pictures three or more.
    return next((tensor for _, tensor in integers if tensor.ndim == 2), None)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of ``value`` with their own names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, str(key))
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", ("",) * len(value))
        for key, part in zip(names, value, strict=True):
            yield from _tensors(part, key)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), field.name)
