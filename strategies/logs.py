"""What the last pipeline stage logged, on every rank.

Only the last stage reaches the loss. Loggers and progress bar live on rank 0, which is the first stage, and callbacks monitor
metrics on every rank. So log calls of a step are recorded on the last stage, merged over microbatches, sent through the
pipeline group and made again on every rank.

Values stay on the device. What was logged, in which order and with which options (the *schema*) is sent only when it is
new; a number that names it travels with every step, over a host-side group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric


@dataclass(frozen=True)
class Call:
    """One call of ``self.log``: a value (a scalar tensor, or a metric object of the module) and its options."""

    name: str
    value: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """A call without its value and batch size. ``metric``: name of the logged metric object in the module."""

    name: str
    options: tuple[tuple[str, Any], ...]
    metric: str | None = None
    has_value: bool = True
    has_batch_size: bool = False


@contextlib.contextmanager
def recording(module: nn.Module) -> Iterator[list[Call]]:
    """Record the module's ``self.log`` calls instead of making them (``log_dict`` calls ``log``)."""
    calls: list[Call] = []

    def log(name: str, value: Any, *args: Any, **options: Any) -> None:
        options.update(zip(("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx"), args, strict=False))
        calls.append(Call(name, value, options))

    before = module.__dict__.get("log")
    module.__dict__["log"] = log
    try:
        yield calls
    finally:
        if before is None:
            del module.__dict__["log"]
        else:
            module.__dict__["log"] = before


def merge(per_microbatch: Sequence[Sequence[Call]], weights: Sequence[float]) -> list[Call]:
    """Return one call per name: means weighted by microbatch size, sums, extrema; of a metric object its last state."""
    grouped: dict[str, list[tuple[Call, float]]] = {}
    for calls, weight in zip(per_microbatch, weights, strict=True):
        for call in calls:
            grouped.setdefault(call.name, []).append((call, weight))
    merged = []
    for name, entries in grouped.items():
        first = entries[0][0]
        if isinstance(first.value, Metric):
            merged.append(entries[-1][0])
            continue
        values = torch.stack([_scalar(call.value) for call, _ in entries])
        options, shares = first.options, torch.tensor([weight for _, weight in entries], device=values.device)
        if options.get("batch_size") is not None:  # the user's own weights
            shares = torch.stack([_scalar(call.options["batch_size"]).to(values.device) for call, _ in entries])
            options = {**options, "batch_size": shares.sum()}
        reduce = first.options.get("reduce_fx", "mean")
        kind = reduce if isinstance(reduce, str) else getattr(reduce, "__name__", "")
        if kind in ("mean", "avg"):
            value = (values * shares).sum() / shares.sum()
        elif kind in ("sum", "min", "max"):
            value = getattr(values, kind)()
        else:
            value = reduce(values)
        merged.append(Call(name, value, options))
    return merged


def _scalar(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().reshape(())


class LogRelay:
    """Sends log calls from the last stage to all ranks of a pipeline.

    Args:
        module: the LightningModule.
        group: the pipeline group; ``host_group``: the same ranks for host data. last_rank: global rank of the last stage.
    """

    def __init__(
        self,
        module: Any,
        group: dist.ProcessGroup,
        host_group: dist.ProcessGroup,
        last_rank: int,
        device: torch.device,
    ) -> None:
        self._module = module
        self._group, self._host_group = group, host_group
        self._last_rank = last_rank
        self._is_last = dist.get_rank() == last_rank
        self._device = device
        self._schemas: list[tuple[_Entry, ...]] = []
        self._shared: dict[str, SharedMetric] = {}

    def send(self, calls: Sequence[Call] | None, extra: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """Return ``extra`` (a scalar) and the calls of the last stage, on every rank.

        Args:
            calls, extra: given on the last stage, ignored elsewhere.
        """
        entries, values = self._pack(calls or ()) if self._is_last else ((), [])
        entries = self._agree(entries)
        packed = torch.zeros(1 + sum(entry.has_value + entry.has_batch_size for entry in entries), device=self._device)
        if self._is_last:
            packed = torch.stack([_scalar(0.0 if extra is None else extra).to(self._device), *values])
        dist.broadcast(packed, self._last_rank, group=self._group)
        return packed[0], self._unpack(entries, packed[1:])

    def replay(self, calls: Sequence[Call]) -> None:
        """Make the calls with the module's own ``log``."""
        for call in calls:
            self._module.log(call.name, call.value, **call.options)

    def _pack(self, calls: Sequence[Call]) -> tuple[tuple[_Entry, ...], list[Tensor]]:
        names = {id(m): name for name, m in self._module.named_modules() if isinstance(m, Metric)}
        entries, values, batch_sizes = [], [], []
        for call in calls:
            options = dict(call.options)
            batch_size = options.pop("batch_size", None)
            if batch_size is not None:
                batch_sizes.append(_scalar(batch_size).to(self._device))
            metric, value = None, call.value
            if isinstance(value, Metric):
                metric = names.get(id(value))
                if metric is None:
                    raise ValueError(
                        f"self.log({call.name!r}, ...) got a metric that is no attribute of the LightningModule. Assign it in "
                        "__init__ (self.acc = Accuracy(...)): with pp > 1 other ranks find it by its name."
                    )
                options.setdefault("metric_attribute", metric)
                value = value._forward_cache
            has_value = value is not None
            entries.append(_Entry(call.name, tuple(options.items()), metric, has_value, batch_size is not None))
            if has_value:
                values.append(_scalar(value).to(self._device))
        return tuple(entries), values + batch_sizes

    def _agree(self, entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
        """Return the last stage's entries on every rank."""
        known = len(self._schemas)
        number = torch.zeros((), dtype=torch.int64)
        if self._is_last:
            number.fill_(self._schemas.index(entries) if entries in self._schemas else known)
        dist.broadcast(number, self._last_rank, group=self._host_group)
        if int(number) == known:
            box: list[Any] = [entries]
            dist.broadcast_object_list(box, self._last_rank, group=self._host_group)
            self._schemas.append(box[0])
        return self._schemas[int(number)]

    def _unpack(self, entries: tuple[_Entry, ...], values: Tensor) -> list[Call]:
        count = sum(entry.has_value for entry in entries)
        remaining, batch_sizes = iter(values[:count].unbind()), iter(values[count:].unbind())
        calls = []
        for entry in entries:
            value: Any = next(remaining) if entry.has_value else None
            if entry.metric is not None:
                value = self._shared_metric(entry.metric, value)
            options = dict(entry.options)
            if entry.has_batch_size:
                options["batch_size"] = next(batch_sizes).long()
            calls.append(Call(entry.name, value, options))
        return calls

    def _shared_metric(self, name: str, last_value: Tensor | None) -> SharedMetric:
        if name not in self._shared:
            metric = self._module.get_submodule(name)
            self._shared[name] = SharedMetric(metric, self._group, self._last_rank, self._device)
        shared = self._shared[name]
        shared.__dict__["_forward_cache"] = last_value
        return shared


class SharedMetric(Metric):
    """Stands for a logged metric object in Lightning's results: computed on the last stage, the same value everywhere."""

    full_state_update = False

    def __init__(self, metric: Metric, group: dist.ProcessGroup, last_rank: int, device: torch.device) -> None:
        super().__init__()
        self._metric_of = lambda: metric  # not a child module: Lightning and torchmetrics walk children
        self._send_group, self._last_rank, self._target = group, last_rank, device

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the metric itself was updated by the step."""

    def _wrap_compute(self, compute: Any) -> Any:
        return compute  # no caching and no synchronisation on top of the metric's own

    def compute(self) -> Tensor:
        value = torch.zeros((), device=self._target)
        if dist.get_rank() == self._last_rank:
            value = torch.as_tensor(self._metric_of().compute(), dtype=torch.float32, device=self._target).reshape(()).clone()
        dist.broadcast(value, self._last_rank, group=self._send_group)
        return value

    def reset(self) -> None:
        self._metric_of().reset()
        self._forward_cache = None

    def to(self, *args: Any, **kwargs: Any) -> SharedMetric:
        return self
