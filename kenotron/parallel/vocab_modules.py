"""The embedding of a vocabulary of which each tp rank has some rows: the user's own module, with another lookup behind it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kenotron.parallel.vocab import vocab_parallel_embedding


class VocabParallelEmbedding(nn.Embedding):
    """An embedding that has some rows of the vocabulary and sums what the tp ranks found."""

    _vocabulary: tuple[int, dist.ProcessGroup]  # its first row, and the ranks that have the others

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["_is_looked_up"] = True
        weight = self._parameters["weight"]
        assert weight is not None
        start, group = self._vocabulary
        return vocab_parallel_embedding(
            input,
            weight,
            start,
            group,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )


class _Watched(nn.Module):
    """Before the class of an embedding with a ``forward`` of its own, which may use what ``super()`` looks up alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.update(_is_looked_up=False, _is_running=True)
        try:
            out = super().forward(*args, **kwargs)
        finally:
            self.__dict__["_is_running"] = False
        if not self._is_looked_up:
            _Rows(self)._refuse()
        return out

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("_is_running"):
            return _Rows(self)
        return super().__getattr__(name)


class _Rows:
    """Stands for the weight of an embedding within its own ``forward``: tells what it is like, and can't be computed with."""

    def __init__(self, module: nn.Module) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        self.dtype, self.device, self._kind = weight.dtype, weight.device, type(module)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"plan: {self._kind.__module__}.{self._kind.__qualname__} does more than super().forward(ids) with its weight, "
            "of which each tp rank has some rows. Call super().forward in its forward, or leave it (and a head that is tied to "
            "it) out of the plan."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and pytrees ask of any object
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __len__ = __iter__ = __mul__ = __rmul__ = __add__ = __radd__ = __matmul__ = __rmatmul__ = _refuse
    __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __pow__ = __neg__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        return rows._refuse()


def spread_embedding(module: nn.Embedding, start: int, group: dist.ProcessGroup) -> None:
    """Let an embedding that has been cut look up rows of all ranks.

    Args:
        start: the first row that is here.
    """
    kind = type(module)
    # Behind the module's own class: where that one scales what super().forward() looked up, it looks up ours.
    bases: tuple[type, ...] = (_Watched, kind, VocabParallelEmbedding)
    if kind.forward is nn.Embedding.forward:
        bases = (VocabParallelEmbedding,) if kind is nn.Embedding else (kind, VocabParallelEmbedding)
    module.__class__ = type(kind.__name__, bases, {"__module__": kind.__module__})
    module.__dict__["_vocabulary"] = (start, group)
