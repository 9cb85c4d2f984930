"""A part of a block that sees whole sequences under sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

SEQUENCE_DIM = 1


class Region:
    """What enters it is ``[batch, sequence, …]``; what leaves it may have these two in one (``[tokens, …]``).

    Both are cut along the sequence when they leave. Anything else can't be.
    """

    def __init__(self) -> None:
        self._batch, self._length = 0, 0

    def enter(self, x: Tensor) -> Tensor:
        """Note how long whole sequences are. Returns ``x``."""
        self._batch, self._length = x.shape[0], x.shape[SEQUENCE_DIM]
        return x

    def leave(self, x: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what ``cut`` makes of ``x [batch, sequence, …]``, in the form that ``x`` has.

        Raises:
            ValueError: it has another form.
        """
        if x.shape[:2] == (self._batch, self._length) and x.ndim > 2:
            return cut(x)
        if x.ndim == 2 and x.shape[0] == self._batch * self._length:
            return cut(x.unflatten(0, (self._batch, self._length))).flatten(0, 1)
        raise ValueError(
            f"sequence_parallel=True: sequences [{self._batch}, {self._length}, …] enter a part of a block, and "
            f"{list(x.shape)} leaves it: where the sequence is can't be told. Set sequence_parallel=False."
        )
