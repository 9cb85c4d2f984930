"""What an optimizer must know of the layout, and which optimizers may run on it.

An *elementwise* optimizer updates each element from that element's own gradient and state: it works as it is on any part of a
tensor. One that looks at a whole parameter (a matrix, its rows, a norm) is wrong on a part, so it is either told where the
other parts lie (`ShardAware`) or refused.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from kenotron.layout import ParallelLayout
from kenotron.parallel._torch import flatten
from kenotron.parallel.apply import Parallelized
from kenotron.parallel.shards import Shards

#: torch's elementwise optimizers. Not among them: Adafactor and Muon (whole matrices), LBFGS (all parameters together),
#: SparseAdam (sparse gradients, which nothing here reduces).
ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)

#: Torch's that look at whole parameters, but at one at a time.
BY_PARAMETER: frozenset[type[Optimizer]] = frozenset({torch.optim.Adafactor, torch.optim.Muon})

#: Why, and what to take instead.
_REASONS: Mapping[type[Optimizer], str] = {
    torch.optim.Adafactor: "keeps means of the rows and columns of whole matrices",
    torch.optim.LBFGS: "takes products over all parameters together, and runs the step several times",
    torch.optim.Muon: "orthogonalises whole matrices",
    torch.optim.SparseAdam: "takes sparse gradients, which are not reduced over ranks",
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the parts of parameters lie.

    Args:
        shards: what this rank holds of each parameter, by name. names: ``id(parameter)`` -> name, of those that are here.
        group: the ranks of this pipeline stage, which together hold its parameters; ``None``: one process.
        rows: a parameter -> ``(start, count)`` of the local rows that it has during an update (ZeRO 1); ``None``: all.
    """

    shards: Shards
    names: Mapping[int, str]
    group: dist.ProcessGroup | None = None
    rows: Callable[[nn.Parameter], tuple[int, int] | None] = lambda _: None

    @staticmethod
    def of(
        done: Parallelized, mesh: DeviceMesh | None, rows: Callable[[nn.Parameter], tuple[int, int] | None] = lambda _: None
    ) -> Placement:
        """Return where the parameters of a sharded module lie. Every rank of the mesh calls it."""
        names = {id(param): name for name, param in done.named_parameters().items()}
        group = None
        if mesh is not None:
            group = flatten(mesh, "dp_replicate", "dp_shard", "cp", "tp", name="stage").get_group()
        return Placement(shards=done.shards, names=names, group=group, rows=rows)


class ShardAware(Optimizer, abc.ABC):
    """An optimizer that works on parts of parameters because it is told where the others are.

    The strategy calls `bind` once, on every rank, after ``configure_optimizers``.
    """

    @abc.abstractmethod
    def bind(self, placement: Placement) -> None:
        """Take note of where parameters lie. May talk to the ranks of ``placement.group``."""


def check_optimizer(optimizer: Optimizer, layout: ParallelLayout) -> None:
    """Refuse an optimizer that would be wrong on this layout.

    Fine anywhere are `ShardAware` ones, torch's elementwise ones (subclasses too that keep their ``step``), and those whose
    class says ``is_elementwise = True``. Anything else needs whole parameters, which data-parallel replicas (ZeRO 0 to 2) and
    pipeline stages have; LBFGS needs all of them.

    Raises:
        ValueError: it is none of these, and parameters are cut.
    """
    kind = type(optimizer)
    cuts = _cuts(layout, whole_model=isinstance(optimizer, torch.optim.LBFGS))
    if not cuts or isinstance(optimizer, ShardAware) or is_elementwise(kind):
        return
    reason = next((why for known, why in _REASONS.items() if issubclass(kind, known)), None)
    raise ValueError(
        f"{kind.__name__} {reason or 'is not known to be elementwise'}, but with {', '.join(cuts)} a rank has only parts of "
        "them. Use torch.optim.AdamW or another elementwise optimizer of torch's, or kenotron.optim.Muon; or set "
        f"{_whole(layout, whole_model=isinstance(optimizer, torch.optim.LBFGS))}, where parameters stay whole."
        + (
            ""
            if reason
            else f" If each element of its update depends on the same element of gradient and state alone, say so: "
            f"{kind.__name__}.is_elementwise = True."
        )
    )


def is_elementwise(kind: type[Optimizer]) -> bool:
    """Tell whether optimizers of a class are elementwise: it says so itself, or its ``step`` is one that is known to be."""
    said: Any = getattr(kind, "is_elementwise", None)
    return bool(said) if said is not None else _has_step_of(kind, ELEMENTWISE)


def is_by_parameter(kind: type[Optimizer]) -> bool:
    """Tell whether optimizers of a class update a parameter by itself: it says so, or its ``step`` is one that does."""
    said: Any = getattr(kind, "is_by_parameter", None)
    return bool(said) if said is not None else _has_step_of(kind, BY_PARAMETER)


def _has_step_of(kind: type[Optimizer], known: Collection[type[Optimizer]]) -> bool:
    # The innermost function: torch wraps the step of every class whose first instance is made.
    step = inspect.unwrap(kind.step)
    return any(issubclass(kind, each) and step is inspect.unwrap(each.step) for each in known)


def _cuts(layout: ParallelLayout, *, whole_model: bool) -> list[str]:
    """Return what leaves a rank with parts of parameters (or of the model)."""
    cuts = [f"{axis}={size}" for axis, size in (("tp", layout.tp), ("ep", layout.ep)) if size > 1]
    if whole_model and layout.pp > 1:
        cuts.append(f"pp={layout.pp}")
    if layout.zero_stage == 3 and layout.dp_shard * layout.cp > 1:
        cuts.append(f"zero_stage={layout.zero_stage} over {layout.dp_shard * layout.cp} ranks")
    return cuts


def _whole(layout: ParallelLayout, *, whole_model: bool) -> str:
    changes = [f"{axis}=1" for axis, size in (("tp", layout.tp), ("ep", layout.ep)) if size > 1]
    if whole_model and layout.pp > 1:
        changes.append("pp=1")
    if layout.zero_stage == 3 and layout.dp_shard * layout.cp > 1:
        changes.append("zero_stage=2")
    return " and ".join(changes)


def local_parameter(param: nn.Parameter, placement: Placement | None) -> str:
    """Return the name of a parameter of an optimizer.

    Raises:
        ValueError: it is none of the module's.
    """
    if placement is None or id(param) not in placement.names:
        raise ValueError(
            f"the optimizer has a parameter of shape {tuple(param.shape)} that is none of the module's. Make the optimizer in "
            "configure_optimizers, from the parameters that the module has there."
        )
    return placement.names[id(param)]
