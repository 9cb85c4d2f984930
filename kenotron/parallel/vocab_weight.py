"""The weight of a vocabulary's head or embedding as a step finds it outside of that module: it multiplies over all tp ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from kenotron.parallel.collectives import copy_to
from kenotron.parallel.logits import VocabParallelLogits
from kenotron.parallel.vocab import vocab_parallel_embedding

_is_stepping = ContextVar("_is_stepping", default=False)


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """Let modules that are split by vocabulary show their weights as parts of a whole."""
    token = _is_stepping.set(True)
    try:
        yield
    finally:
        _is_stepping.reset(token)


class VocabularyWeight(Tensor):
    """This rank's rows of a weight, which know that they are a part.

    ``F.linear(hidden, weight)`` gives vocabulary-parallel logits, ``F.embedding(ids, weight)`` rows of all ranks; its shape is
    the whole one. ``own`` and ``group`` are for a loss that knows of the split. Anything else is an error.
    """

    own: Tensor
    group: ProcessGroup
    _start: int

    @staticmethod
    def of(param: Tensor, start: int, group: ProcessGroup) -> VocabularyWeight:
        """Return the weight of which ``param`` has the rows from ``start`` on."""
        made = param.as_subclass(VocabularyWeight)
        made.own, made.group, made._start = param, group, start
        return made

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        rows, *others = self.own.shape
        return torch.Size((rows * self.group.size(), *others))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.linear, F.embedding):
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            weight = given.pop("weight")
            if isinstance(weight, cls) and not any(isinstance(value, cls) for value in (given["input"], *args[2:])):
                if func is F.embedding and not args[2:] and given.keys() == {"input"}:
                    return vocab_parallel_embedding(given["input"], weight.own, weight._start, weight.group)
                if func is F.linear:
                    bias = args[2] if len(args) > 2 else given.get("bias")
                    local = F.linear(copy_to(given["input"], weight.group), weight.own, bias)
                    return VocabParallelLogits.from_local(local, weight.group)
        if getattr(func, "__name__", "") == "__get__" or func in (Tensor.dim, Tensor.is_floating_point, Tensor.__repr__):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise ValueError(
            f"tp > 1: the step computes {getattr(func, '__name__', func)} with the weight of a head or embedding, of which "
            "each rank has some rows of the vocabulary. Call the module, or F.linear, F.embedding or kenotron's "
            "linear_cross_entropy with its weight; or leave head and embedding out of the plan."
        )


class ShowsPart(nn.Module):
    """Before the class of a module that is split by vocabulary: code outside of it gets a ``VocabularyWeight`` within steps."""

    _part: tuple[int, ProcessGroup]  # the first row, and the ranks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _is_stepping.set(False)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _is_stepping.reset(token)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        # FSDP2 asks for its own shards, between its gathering and freeing.
        if name == "weight" and _is_stepping.get() and isinstance(found, nn.Parameter) and not isinstance(found.data, DTensor):
            return VocabularyWeight.of(found, *self._part)
        return found


def show_part(module: nn.Module, start: int, group: ProcessGroup) -> None:
    """Let a module that has been cut by vocabulary show its weight as a part."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (ShowsPart, kind), {"__module__": kind.__module__})
    module.__dict__["_part"] = (start, group)
