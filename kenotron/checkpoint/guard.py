"""The fence, put right before every update that a torch optimizer makes.

torch calls its hooks around ``Optimizer.step`` before it calls the closure, in which Lightning runs forward and backward.
So the hook must not wait: it wraps the closure, and the fence comes when that returns. LBFGS and its like call it several
times, and change nothing before the first.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class OptimizerGuard:
    """Calls ``fence`` before each step of any optimizer of this process, and remembers which optimizers there are.

    Args:
        fence: returns when the state may change.
        on_step: called after each step.
    """

    def __init__(self, fence: Callable[[], object], on_step: Callable[[], None]) -> None:
        self._fence = fence
        self._on_step = on_step
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]

    def remove(self) -> None:
        """Step aside."""
        for handle in self._handles:
            handle.remove()

    def lazy_tensors(self) -> Callable[[torch.Tensor], bool]:
        """Return a function that tells which tensors only those optimizers change, as far as they have stepped by now."""
        known = {_key(tensor) for optimizer in self._optimizers for tensor in _tensors_of(optimizer)}
        return lambda tensor: _key(tensor) in known

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._optimizers.add(optimizer)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._fenced(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer itself
            return (args[0], self._fenced(args[1]), *args[2:]), kwargs
        self._fence()
        return None

    def _fenced(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(closure)
        def then_fence(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._fence()
            return result

        return then_fence

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._on_step()


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _key(tensor: torch.Tensor) -> tuple[int, int]:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.nbytes
