"""A coordinate check: how large are activations at several widths, and do they stay so while the model learns?

If a parametrisation is right, the mean size of each activation is about the same at every width, at the start and after each
update (Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1). Where it grows with width, so does the risk that a rate
which suits a small model breaks a large one.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kenotron.parallel.shards import canonical


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """The mean size of one activation.

    Args:
        width: of the model. step: updates made before. module: whose output it is. size: mean of the absolute values.
    """

    width: int
    step: int
    module: str
    size: float


def coordinate_check(
    make: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Sequence[Any],
    *,
    optimizer: Callable[[nn.Module], Optimizer],
    loss: Callable[[nn.Module, Any], Tensor],
    modules: str = r".",
    seeds: Sequence[int] = (1,),
) -> list[Coordinate]:
    """Train a model at several widths for a few updates, and measure its activations before each and after the last.

    Args:
        make: builds a model of a width. batches: one for each update. optimizer: of a model.
        loss: ``loss(model, batch)``, 0-dim.
        modules: regular expression for the names of the modules to measure, found anywhere in a name.
        seeds: of torch's generator, before each model is built; sizes are means over them.

    Returns:
        For each width, step from 0 to ``len(batches)`` and module, one number. With ``batches`` b₀ … bₙ₋₁ the size at step s is
        that on b₀, so that only the model differs.

    Raises:
        ValueError: nothing to compare, or no module matches.
    """
    if len(set(widths)) < 2 or not batches or not seeds:
        raise ValueError(
            f"widths={list(widths)}, {len(batches)} batches, seeds={list(seeds)}: a check takes two different widths or more, "
            "and at least one batch and one seed."
        )
    sums: dict[tuple[int, int, str], float] = {}
    for width in widths:
        for seed in seeds:
            torch.manual_seed(seed)
            model = make(width)
            own = optimizer(model)
            for step in range(len(batches) + 1):
                for name, size in _sizes(model, batches[0], loss, modules).items():
                    sums[width, step, name] = sums.get((width, step, name), 0.0) + size
                if step < len(batches):
                    own.zero_grad()
                    loss(model, batches[step]).backward()
                    own.step()
    return [Coordinate(width=w, step=s, module=m, size=total / len(seeds)) for (w, s, m), total in sums.items()]


@torch.no_grad()
def _sizes(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], modules: str) -> dict[str, float]:
    """Return the mean size of each module's output in one forward pass."""
    found: dict[str, Tensor] = {}
    with _watching(model, re.compile(modules), found):
        loss(model, batch)
    if not found:
        raise ValueError(f"modules={modules!r} matches no module with a tensor for its output. Set another expression.")
    return {name: float(size) for name, size in found.items()}


@contextlib.contextmanager
def _watching(model: nn.Module, pattern: re.Pattern[str], found: dict[str, Tensor]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if name and pattern.search(canonical(name)):
            handles.append(module.register_forward_hook(_note(canonical(name), found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(name: str, found: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 0:
            found[name] = first.detach().abs().mean(dtype=torch.float32)

    return hook


def growth(found: Sequence[Coordinate], step: int) -> dict[str, float]:
    """Return by which power of the width each activation grows: the slope of log size over log width, by least squares.

    0 where it does not depend on the width, 0.5 for √width. Activations that are zero or not finite somewhere are left out.
    """
    by_module: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        if one.step == step:
            size = math.log(one.size) if 0 < one.size < math.inf else math.nan
            by_module.setdefault(one.module, []).append((math.log(one.width), size))
    return {
        module: _slope(points)
        for module, points in by_module.items()
        if len(points) > 1 and not any(math.isnan(size) for _, size in points)
    }


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x_mean, y_mean = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
