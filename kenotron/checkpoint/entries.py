"""What an optimizer keeps for one parameter, as tensors with names: any nesting of tensors, numbers and plain values.

A tensor keeps its key. A number is a tensor without dimensions under ``key:int`` and the like. Of anything else (LBFGS's lists)
the tensors are ``key.0``, ``key.1``, …, and ``key:json`` holds the structure around them, encoded as in ``values.py``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kenotron.checkpoint.errors import ManifestDamagedError
from kenotron.checkpoint.values import Attachments, decode, encode

#: Ends the name of a structure, which is whole wherever it is stored, however many bytes it has.
STRUCTURE = ":json"
_NUMBERS = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}


def flatten(key: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that hold an entry of an optimizer's state, with their names. None is no entry."""
    kind = type(value).__name__
    if value is None:
        return
    if isinstance(value, torch.Tensor):
        yield key, value
    elif type(value) in (bool, int, float):
        yield f"{key}:{kind}", torch.tensor(value, dtype=_NUMBERS[kind])
    else:
        found = Attachments(tensor_prefix=f"{key}.")
        try:
            node = encode(value, found)
        except ValueError as error:
            warnings.warn(f"checkpoints lack a {kind} in an optimizer's state ({key!r}): {error}", stacklevel=2)
            return
        yield from found.tensors.items()
        yield key + STRUCTURE, torch.frombuffer(bytearray(json.dumps(node).encode()), dtype=torch.uint8)


def join(entries: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the state whose entries ``flatten`` gave these names.

    Raises:
        ManifestDamagedError: they contradict each other.
    """
    state: dict[str, Any] = dict(entries)

    def refuse(file: str) -> bytes:
        raise ManifestDamagedError(f"an optimizer's state refers to the pickle {file!r:.80}")

    for name in entries:
        key, _, kind = name.rpartition(":")
        if kind in _NUMBERS and key:
            state[key] = state.pop(name).item()
        elif name.endswith(STRUCTURE) and key:
            try:
                node = json.loads(state.pop(name).cpu().numpy().tobytes())
            except ValueError as error:
                raise ManifestDamagedError(f"{name} of an optimizer's state is no JSON: {error}") from error
            state[key] = decode(node, lambda inner: state.pop(inner), refuse)
    return state
