"""The fence, put right before every update that a torch optimizer makes; and a watch for whatever else changes its tensors.

The hook around ``Optimizer.step`` must not wait before forward and backward, which run in the closure: the fence comes when
that returns. LBFGS and its like call it several times, and change nothing before the first.

In a run's first steps all that an optimizer holds is summed after a step and before its next. What differs is changed by
something else, such as weights that are clipped in ``training_step``: it is never lazy. Nothing is before it was watched once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint.format import bytes_of
from kenotron.checkpoint.sources import sums_of
from kenotron.closures import with_closure

#: How often each optimizer is watched from one step to its next: it reads all that it holds twice.
_NUM_WATCHES = 2

#: Address and size: what tells a tensor's memory.
Key = tuple[int, int]


class OptimizerGuard:
    """Calls ``fence`` before each step of any optimizer of this process, and remembers which optimizers there are.

    Args:
        fence: returns when the state may change.
        on_step: called after each step.
    """

    def __init__(self, fence: Callable[[], object], on_step: Callable[[], None]) -> None:
        self._fence = fence
        self._on_step = on_step
        self._watches: weakref.WeakKeyDictionary[Optimizer, _Watch] = weakref.WeakKeyDictionary()
        self._others: _Watch | None = None
        self._restless: set[Key] = set()
        self._handles = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]

    def remove(self) -> None:
        """Step aside."""
        for handle in self._handles:
            handle.remove()

    def lazy_tensors(self) -> Callable[[torch.Tensor], bool]:
        """Return a function that tells which tensors only those optimizers change, as far as they have stepped by now."""
        watched = [(watch, _tensors_of(optimizer)) for optimizer, watch in self._watches.items()]
        if self._others is not None:
            watched.append((self._others, iter(self._others.held())))
        known = {_key(tensor) for watch, tensors in watched if watch.num_done for tensor in tensors} - self._restless
        return lambda tensor: _key(tensor) in known

    def watch_others(self, tensors: Iterable[torch.Tensor]) -> None:
        """Also watch what may be in no optimizer, such as frozen weights: what never changes is lazy as well."""
        self._others = _Watch(list(tensors))

    def distrust(self, tensors: Iterable[torch.Tensor]) -> None:
        """Something else than a step has changed these: they are not lazy any more."""
        self._restless.update(_key(tensor) for tensor in tensors)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._watches.setdefault(optimizer, _Watch([]))
        found = with_closure(args, kwargs, functools.partial(self._fenced, optimizer))
        if found is None:
            self._look(optimizer)
            self._fence()
        return found

    def _fenced(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(closure)
        def then_fence(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._look(optimizer)
            self._fence()
            return result

        return then_fence

    def _look(self, optimizer: Optimizer) -> None:
        """Find out, once after each step that is watched, what has changed since."""
        self._restless |= self._watches[optimizer].compare()
        if self._others is not None:
            self._restless |= self._others.compare()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self._watches.get(optimizer)
        if watch is not None and watch.num_done < _NUM_WATCHES:
            watch.note(_tensors_of(optimizer))
        if self._others is not None and self._others.num_done < _NUM_WATCHES:
            inside = {_key(tensor) for each in self._watches for tensor in _tensors_of(each)}
            self._others.note(tensor for tensor in self._others.held() if _key(tensor) not in inside)
        self._on_step()


class _Watch:
    """Compares what tensors hold at two moments."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.num_done = 0
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._noted: dict[Key, tuple[torch.Tensor, Any]] = {}

    def held(self) -> list[torch.Tensor]:
        """Return the tensors that it was made for, as far as they are there."""
        return [tensor for reference in self._tensors if (tensor := reference()) is not None]

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        self._noted = {_key(tensor): (local, _sum(local)) for tensor in tensors if (local := _local(tensor)).numel()}

    def compare(self) -> set[Key]:
        """Return what has changed since the last note, if it was not compared before."""
        noted, self._noted = self._noted, {}
        if not noted:
            return set()
        self.num_done += 1
        return {key for key, (tensor, former) in noted.items() if not _is_same(_sum(tensor), former)}


def _sum(tensor: torch.Tensor) -> Any:
    if tensor.is_cuda:
        return sums_of(tensor.contiguous())
    return crc32c(bytes_of(tensor))


def _is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what lies here, with the memory that it has now: ``.data = …`` gives the tensor another one."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def _key(tensor: torch.Tensor) -> Key:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.nbytes
