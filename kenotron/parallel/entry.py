"""Let a model see whole sequences until its first block, and cut there: for what it makes of the whole alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a model: how long its sequences are, how long a rank's part, and how a tensor becomes it."""

    batch: int
    length: int
    own: int
    cut: Callable[[Tensor], Tensor]


class BlockEntry:
    """Cuts what blocks are called with, hidden states and whatever else runs along the sequence.

    Args:
        blocks: all of a model, each called with hidden states ``[batch, length, …]``. What the first returns is short already.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._call: Call | None = None
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)

    def open(self, call: Call) -> None:
        """Cut until ``close``.

        Raises:
            ValueError: whole sequences and parts can't be told apart.
        """
        if call.own == call.length:
            raise ValueError(f"cp > 1: sequences of {call.length} tokens are too short for as many ranks. Use longer ones.")
        self._call = call

    def close(self) -> None:
        self._call = None

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._call is None:
            return None
        return tuple(self._part(arg) for arg in args), {name: self._part(arg) for name, arg in kwargs.items()}

    def _part(self, value: Any) -> Any:
        call = self._call
        assert call is not None
        if (
            isinstance(value, Tensor)
            and value.ndim >= 2
            and value.shape[0] in (1, call.batch)
            and value.shape[1] == call.length
        ):
            return call.cut(value)
        if type(value) in (tuple, list):
            return type(value)(self._part(part) for part in value)
        return value
