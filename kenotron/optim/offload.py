"""Optimizer state in host memory: an update brings it to the device a part at a time, and puts it back.

The arithmetic stays where it was, so an update is bit for bit the same, with any optimizer that treats parameters one by one.
On CUDA the next part travels while one is worked on, and the host waits for none of it. Two moments in float32 cross the bus
in both directions in each update: 16 bytes for each parameter of a rank. Accumulate gradients to make updates rarer.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kenotron.optim.placement import ShardAware, is_by_parameter, is_elementwise
from kenotron.parallel._torch import set_local
from kenotron.parallel.grads import local

#: Elements of a part. With two float32 moments 128 MiB, of which three are on the device: one comes, one is used, one goes.
PART_NUMEL = 1 << 24


class HostState:
    """Keeps the state of an optimizer in host memory, pinned on CUDA, and replaces the optimizer's ``step``.

    Only parameters with gradients are updated, as ever. Hooks of ``Optimizer.step`` run once for each part.

    Args:
        optimizer: whose state; parameters may be DTensors.
        sizes: elements of a parameter by ``id``, the same on all ranks that update it together; ``None``: its own.
        part_numel: elements of the parameters that are updated together.
        held: a context in which updates of parts are one (`ShardedUpdate.held`).

    Raises:
        ValueError: an optimizer that looks at several parameters at once, as far as is known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sizes: Mapping[int, int] | None = None,
        *,
        part_numel: int = PART_NUMEL,
        held: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        kind = type(optimizer)
        if not (is_elementwise(kind) or isinstance(optimizer, ShardAware) or is_by_parameter(kind)):
            raise ValueError(
                f"offload_optimizer=True updates a part of the parameters at a time, and {kind.__name__} is not known to treat "
                "them one by one. Use an optimizer of torch's other than LBFGS and SparseAdam, or kenotron.optim.Muon; if each "
                f"element of its update depends on the same element of gradient and state alone, set {kind.__name__}."
                "is_elementwise = True; or set offload_optimizer=False."
            )
        self._optimizer, self._sizes, self._part_numel, self._held = optimizer, sizes or {}, part_numel, held
        self._host: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._update = optimizer.step
        # A method, as schedulers expect that are made later: they wrap it once more.
        step = types.MethodType(lambda _, closure=None: self.step(closure), optimizer)
        optimizer.step = step  # type: ignore[method-assign]
        optimizer.register_state_dict_pre_hook(lambda _: self.wait())
        optimizer.register_load_state_dict_post_hook(lambda _: self.put_away())

    def wait(self) -> None:
        """Return when the host may read the state."""
        if self._stream is not None:
            self._stream.synchronize()

    def put_away(self) -> None:
        """Bring all state to host memory, as after a checkpoint was loaded onto the device."""
        self._put_back([param for group in self._optimizer.param_groups for param in group["params"]])
        self.wait()

    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have gradients, part by part. Returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = self._parts()
        grads = {param: param.grad for part in parts for param in part}
        for param in grads:
            param.grad = None
        try:
            with self._held():
                self._update_parts(parts, grads)
        finally:
            for param, grad in grads.items():
                if grad is None or grad.shape == param.shape:  # else a part, which has had its use
                    param.grad = grad
        return loss

    def _update_parts(self, parts: Sequence[Sequence[nn.Parameter]], grads: Mapping[nn.Parameter, Tensor | None]) -> None:
        self._bring(parts[0])
        for index, part in enumerate(parts):
            for param in part:
                param.grad = grads[param]
            with self._arrived():
                self._bring(parts[index + 1] if index + 1 < len(parts) else ())
            self._update()
            for param in part:
                param.grad = None
            self._put_back(part)

    def _parts(self) -> list[list[nn.Parameter]]:
        """Return the parameters that have gradients in runs of about equal size; one empty run where none has."""
        parts: list[list[nn.Parameter]] = [[]]
        room = self._part_numel
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                size = self._sizes.get(id(param), param.numel())
                if parts[-1] and size > room:
                    parts.append([])
                    room = self._part_numel
                parts[-1].append(param)
                room -= size
        return parts

    def _tensors(self, params: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        """Yield what of the state is large: counters stay where the optimizer wants them."""
        for param in params:
            for key, value in self._optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    yield param, key, value

    def _bring(self, params: Sequence[nn.Parameter]) -> None:
        with self._copying(params):
            for param, key, value in self._tensors(params):
                host = self._host.get((param, key))
                if host is not None:
                    part = torch.empty_like(host, device=local(param).device, pin_memory=False)
                    self._put(param, key, value, part.copy_(host, non_blocking=True))

    def _put_back(self, params: Sequence[nn.Parameter]) -> None:
        if not params:
            return
        is_new = False
        with self._copying(params, after_update=True):
            for param, key, value in self._tensors(params):
                part = local(value)
                host = self._host.get((param, key))
                if host is None or host.shape != part.shape or host.dtype != part.dtype:
                    host = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
                    self._host[param, key], is_new = host, True
                if part.data_ptr() != host.data_ptr():
                    self._put(param, key, value, host.copy_(part, non_blocking=True))
        if is_new:  # made by the optimizer: its memory is used again as soon as nobody holds it
            self.wait()

    def _put(self, param: nn.Parameter, key: str, value: Tensor, part: Tensor) -> None:
        if isinstance(value, DTensor):
            set_local(value, part)
        else:
            self._optimizer.state[param][key] = part

    @contextlib.contextmanager
    def _copying(self, params: Sequence[nn.Parameter], *, after_update: bool = False) -> Iterator[None]:
        """Issue copies on a stream of their own, where the parameters are on CUDA."""
        if not params or not local(params[0]).is_cuda:
            yield
            return
        device = local(params[0]).device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        if after_update:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    @contextlib.contextmanager
    def _arrived(self) -> Iterator[None]:
        """Let the update wait for what has been asked for so far, and not for what is asked for inside of this."""
        if self._stream is None:
            yield
            return
        event = self._stream.record_event()
        yield
        torch.cuda.current_stream(self._stream.device).wait_event(event)
