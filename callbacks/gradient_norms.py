"""Norms of gradients, of each parameter group and each layer, on any layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kenotron.callbacks.summary import Recorder, check_every
from kenotron.layout import ParallelLayout
from kenotron.parallel.grads import GradientNorm
from kenotron.parallel.shards import Shards
from kenotron.strategies.training import Training

#: Where bins of a histogram end: powers of two from 2^-40 to 2^16, on both sides of zero.
_EXPONENTS = range(-40, 17)


class GradientNorms(Recorder):
    """Log the norm of the gradient before it is clipped: of all, of each parameter group, and of each layer.

    ``gradient_norm/total``, ``gradient_norm/group/<group>`` and ``gradient_norm/layer/<layer>``. Every element counts once, on
    any layout: the values are those of one process. A layer is what comes up to the first number in a parameter's name
    (``model.layers.3``), or else its module. Nothing is read on the host but at the steps that are logged.

    Args:
        every_n_train_steps: optimizer steps between two of them.
        layers: log those of layers.
        histogram: write a histogram of each layer's gradients to TensorBoard too.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive, or the strategy hides gradients (Lightning's FSDP, DeepSpeed).
    """

    def __init__(self, every_n_train_steps: int = 50, *, layers: bool = True, histogram: bool = False) -> None:
        super().__init__()
        self._every, self._layers, self._histogram = check_every(every_n_train_steps), layers, histogram
        self._found: dict[str, float] = {}

    def is_in_table(self, name: str) -> bool:
        """Not each layer."""
        return "/layer/" not in name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies whose gradients can't be told apart."""
        kind = type(trainer.strategy).__name__
        if stage == "fit" and kind in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"GradientNorms needs the gradient of each parameter, which {kind} does not show. Set strategy='kenotron', "
                "'ddp' or 'model_parallel', or leave the callback out."
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Find the norms of every n-th step."""
        if (trainer.global_step + 1) % self._every:
            return
        strategy = trainer.strategy
        source = gradient_source(trainer, pl_module)
        groups = self._groups(trainer, optimizer, source)
        names = [name for members in groups.values() for name in members]
        layers: dict[str, list[str]] = {}
        for name in names if self._layers or self._histogram else ():
            layers.setdefault(f"gradient_norm/layer/{layer_of(name)}", []).append(name)
        sets: dict[str, Collection[str]] = {f"gradient_norm/total{self._suffix(trainer, optimizer)}": set(names)}
        sets |= {f"gradient_norm/group/{name}": set(members) for name, members in groups.items()}
        sets |= {name: set(members) for name, members in layers.items() if self._layers}
        found = source.grad_norms(sets)
        values = torch.stack(list(found.values())).tolist()  # the one read on the host
        self._found |= dict(zip(found, values, strict=True))
        if self._histogram:
            self._write(trainer, source, {name: set(members) for name, members in layers.items()}, strategy.root_device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log them, at the step that they belong to."""
        found, self._found = self._found, {}
        self.record(trainer, found)

    def _suffix(self, trainer: Any, optimizer: Optimizer) -> str:
        """Tell optimizers apart, where there are several."""
        all_of_them = list(trainer.optimizers)
        return f"/{type(optimizer).__name__}_{all_of_them.index(optimizer)}" if len(all_of_them) > 1 else ""

    def _groups(self, trainer: Any, optimizer: Optimizer, source: Any) -> dict[str, list[str]]:
        prefix = self._suffix(trainer, optimizer).removeprefix("/")
        groups = zip(optimizer.param_groups, source.parameter_names(optimizer), strict=True)
        return {
            "/".join(filter(None, (prefix, str(group.get("name", f"group_{number}"))))): names
            for number, (group, names) in enumerate(groups)
        }

    def _write(self, trainer: Any, source: Any, layers: Mapping[str, Collection[str]], device: torch.device) -> None:
        positive = [2.0**exponent for exponent in _EXPONENTS]
        edges = [-edge for edge in reversed(positive)] + [0.0] + positive
        counts, spans = source.grad_histograms(layers, torch.tensor(edges, dtype=torch.float64, device=device))
        if not trainer.is_global_zero:
            return
        writers = [logger.experiment for logger in trainer.loggers if type(logger).__name__ == "TensorBoardLogger"]
        for name, count, (least, greatest) in zip(layers, counts.tolist(), spans.tolist(), strict=True):
            if not sum(count):
                continue
            limits = [*edges, max(greatest, edges[-1] * 2)]
            middles = [(low + high) / 2 for low, high in zip([min(least, edges[0]), *edges], limits, strict=True)]
            for writer in writers:
                writer.add_histogram_raw(
                    name.replace("gradient_norm", "gradient"),
                    min=least, max=greatest, num=sum(count),
                    sum=sum(n * x for n, x in zip(count, middles, strict=True)),
                    sum_squares=sum(n * x * x for n, x in zip(count, middles, strict=True)),
                    bucket_limits=limits, bucket_counts=count, global_step=trainer.global_step + 1,
                )  # fmt: skip


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first number, or else its module."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def gradient_source(trainer: Any, pl_module: L.LightningModule) -> Any:
    """Return what tells the gradients of a trainer: Kénotron's strategy, or the module that another one trains."""
    return trainer.strategy if isinstance(trainer.strategy, Training) else _Whole(pl_module)


class _Whole:
    """The gradients of a module that another strategy trains: whole on each rank, or DTensors."""

    def __init__(self, module: nn.Module) -> None:
        self._named = dict(module.named_parameters())
        self._norm = GradientNorm(ParallelLayout(dp=1), Shards())

    def parameter_names(self, optimizer: Optimizer) -> list[list[str]]:
        names = {id(param): name for name, param in self._named.items()}
        return [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]

    def grad_norms(self, sets: Mapping[str, Collection[str]]) -> dict[str, Tensor]:
        squares = {name: _norm(grad).square() for name, grad in self._gradients()}
        zero = torch.zeros((), dtype=torch.float64)
        totals = {key: sum((squares[name] for name in names if name in squares), zero) for key, names in sets.items()}
        return {key: torch.as_tensor(total).sqrt().cpu() for key, total in totals.items()}

    def grad_histograms(self, sets: Mapping[str, Collection[str]], edges: Tensor) -> tuple[Tensor, Tensor]:
        whole: dict[str, nn.Parameter] = {}
        for name, grad in self._gradients():
            whole[name] = nn.Parameter(torch.empty_like(full := _full(grad)), requires_grad=False)
            whole[name].grad = full
        return self._norm.histograms(whole, sets, edges)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, param.grad) for name, param in self._named.items() if param.grad is not None)


@torch.no_grad()
def _norm(grad: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(grad.detach(), dtype=torch.promote_types(grad.dtype, torch.float32))
    return _full(norm).double()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
