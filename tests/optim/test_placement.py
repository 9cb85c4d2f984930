"""Optimizers that would be wrong on parts of parameters are refused, with the reason and what to type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_helpers import Run, decoder, train
from torch import nn
from torch.optim import Optimizer

from kenotron.layout import ParallelLayout
from kenotron.optim import Muon, ShardAware, check_optimizer
from kenotron.optim.placement import ELEMENTWISE
from kenotron.testing import RankPool

SHARDED = [
    {"tp": 2},
    {"dp": 2, "zero_stage": 3},
    {"cp": 2, "zero_stage": 3},
    {"dp": 2, "ep": 2, "zero_stage": 0},
]
WHOLE: list[dict[str, Any]] = [
    {},
    {"dp": 4, "zero_stage": 0},
    {"pp": 2},
    {"dp": 2, "dp_replicate": 2},
    {"cp": 2, "zero_stage": 0},
    {"dp": 2, "zero_stage": 1},
    {"cp": 2, "zero_stage": 1},
    {"dp": 2, "zero_stage": 2},
]


def layout(**sizes: Any) -> ParallelLayout:
    return ParallelLayout(**{"dp": 1, **sizes})


def made(kind: type[Optimizer]) -> Optimizer:
    return kind([nn.Parameter(torch.ones(2, 2))])  # type: ignore[call-arg]


class Foreign(Optimizer):
    """One that nobody knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})


class Declared(Foreign):
    is_elementwise = True


class Renamed(torch.optim.AdamW):
    """AdamW with another name."""


class Altered(torch.optim.AdamW):
    """AdamW with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Aware(Muon):
    pass


@pytest.mark.parametrize("sizes", SHARDED + WHOLE)
@pytest.mark.parametrize("kind", [*sorted(ELEMENTWISE, key=lambda kind: kind.__name__), Renamed, Declared, Muon, Aware])
def test_elementwise_and_shard_aware_ones_run_on_any_layout(kind: type[Optimizer], sizes: dict[str, Any]) -> None:
    check_optimizer(made(kind), layout(**sizes))
    assert issubclass(Aware, ShardAware)


OTHERS = [torch.optim.Adafactor, torch.optim.Muon, torch.optim.SparseAdam, torch.optim.LBFGS, Foreign, Altered]


@pytest.mark.parametrize("kind", OTHERS)
def test_others_run_where_parameters_are_whole_and_nowhere_else(kind: type[Optimizer]) -> None:
    optimizer = made(kind)
    for sizes in WHOLE:
        if "pp" in sizes and kind is torch.optim.LBFGS:  # needs all parameters, not each one whole
            with pytest.raises(ValueError, match=r"pp=2.*set pp=1"):
                check_optimizer(optimizer, layout(**sizes))
        else:
            check_optimizer(optimizer, layout(**sizes))
    for sizes in SHARDED:
        with pytest.raises(ValueError, match=kind.__name__):
            check_optimizer(optimizer, layout(**sizes))


def test_every_optimizer_of_torchs_is_known() -> None:
    kinds = {kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    unknown = kinds - {Optimizer} - ELEMENTWISE - set(OTHERS)
    assert not unknown, "decide for each whether it is elementwise"


def test_the_error_says_why_and_what_to_type() -> None:
    with pytest.raises(ValueError, match=r"rows and columns.*zero_stage=3 over 2 ranks.*kenotron.optim.Muon.*set zero_stage=2"):
        check_optimizer(made(torch.optim.Adafactor), layout(dp=2, zero_stage=3))
    with pytest.raises(ValueError, match=r"orthogonalises.*tp=2, zero_stage=3 over 2 ranks.*set tp=1 and zero_stage=2"):
        check_optimizer(made(torch.optim.Muon), layout(dp=2, tp=2, zero_stage=3))
    with pytest.raises(ValueError, match=r"not known to be elementwise.*Foreign.is_elementwise = True"):
        check_optimizer(made(Foreign), layout(tp=2))


def adafactor(module: nn.Module) -> Optimizer:
    return torch.optim.Adafactor(module.parameters())


def elsewhere(module: nn.Module) -> Optimizer:
    return Muon([nn.Parameter(torch.ones(2, 2))])


def error_of(run: Run) -> str:
    try:
        train(run)
    except ValueError as error:
        return str(error)
    return ""


def test_the_strategy_refuses_before_training(optim_pool: RankPool) -> None:
    for error in optim_pool.run(error_of, 2, Run(decoder, adafactor, {"zero_stage": 3})):
        assert error.startswith("Adafactor keeps means")
    for error in optim_pool.run(error_of, 2, Run(decoder, elsewhere, {"tp": 2})):
        assert "none of the LightningModule's" in error


def test_an_optimizer_without_placement_refuses_dtensors(optim_pool: RankPool) -> None:
    assert all("call optimizer.bind" in error for error in optim_pool.run(unbound, 2))


def unbound() -> str:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)]))
    param.grad = torch.ones_like(param)
    try:
        Muon([param]).step()
    except ValueError as error:
        return str(error)
    return ""
