"""Optimizer state in host memory: updates in parts are the same updates, and between them nothing is on the device."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from kenotron.optim import HostState, Muon, Schedule, ScheduleLR, StochasticAdamW, muon_groups
from kenotron.parallel.grads import local
from kenotron.testing import RankPool

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, fused=True, amsgrad=True),
    "AdamW single": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, foreach=False),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.02),
    "Muon": lambda m: Muon(muon_groups(m, lr=0.02), lr=0.02),
    "stochastic": lambda m: StochasticAdamW(m.to(torch.bfloat16).parameters(), lr=0.02),
}


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))


def closure_of(module: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(next(module.parameters()).dtype)
        loss = module(x).square().mean()
        loss.backward()
        return loss

    return closure


def large(optimizer: Optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]


@pytest.mark.parametrize("part_numel", [1, 100, 1 << 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_in_parts_are_the_same_to_the_bit(name: str, part_numel: int) -> None:
    whole, parts = model(), model()
    plain, offloaded = OPTIMIZERS[name](whole), OPTIMIZERS[name](parts)
    HostState(offloaded, part_numel=part_numel)
    for step in range(4):
        losses = [o.step(closure_of(m, o, step)) for m, o in ((whole, plain), (parts, offloaded))]
        assert losses[0].equal(losses[1])
        assert all(
            p.grad is not None and p.grad.equal(q.grad) for p, q in zip(parts.parameters(), whole.parameters(), strict=True)
        )
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        assert p.equal(q)
    assert large(offloaded)
    for mine, its in zip(large(offloaded), large(plain), strict=True):
        assert mine.equal(its)


def sharded() -> bool:
    """Update DTensors with and without parts; return whether all are equal, to the bit, and the same objects throughout."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in (5, 8, 3, 6)]
    runs = []
    for offloaded in (False, True):
        params = [nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])) for weight in weights]
        optimizer = torch.optim.AdamW(params, lr=0.02)
        if offloaded:
            HostState(optimizer, part_numel=40)
        kept: list[list[torch.Tensor]] = []
        for step in range(3):
            for param in params:
                param.grad = (param.detach() * (step + 1)).sin()
            optimizer.step()
            kept.append(large(optimizer))
        assert all(now is before for now, before in zip(kept[-1], kept[0], strict=True))
        runs.append([local(tensor.detach()) for tensor in (*params, *kept[-1])])
    dist.destroy_process_group()
    return all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_sharded_tensors_are_updated_in_parts(optim_pool: RankPool) -> None:
    assert optim_pool.run(sharded, 2) == [True, True]


def test_no_more_than_two_parts_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    state = HostState(optimizer, part_numel=72)
    host: set[int] = set()
    away: list[int] = []

    def counted() -> None:
        away.append(sum(tensor.data_ptr() not in host for tensor in large(optimizer)))

    optimizer.step(closure_of(module, optimizer, 0))
    host = {tensor.data_ptr() for tensor in large(optimizer)}
    optimizer.register_step_post_hook(lambda *_: counted())
    optimizer.step(closure_of(module, optimizer, 1))
    counted()
    assert away == [8, 8, 8, 8, 4, 0]  # two moments of a weight and a bias, of this part and of the next
    assert {tensor.data_ptr() for tensor in large(optimizer)} == host
    state.wait()


def test_parameters_without_gradients_stay() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    HostState(optimizer, part_numel=1)
    closure = closure_of(module, optimizer, 0)

    def without_first() -> torch.Tensor:
        loss = closure()
        module[0].weight.grad = None  # type: ignore[index, union-attr]
        return loss

    before = copy.deepcopy(module)
    optimizer.step(without_first)
    assert module[0].weight.equal(before[0].weight)  # type: ignore[index, operator, union-attr]
    assert not module[1].weight.equal(before[1].weight)  # type: ignore[index, operator, union-attr]
    assert module[0].weight.grad is None  # type: ignore[index, union-attr]

    def without_any() -> None:
        optimizer.zero_grad()

    before = copy.deepcopy(module)
    optimizer.step(without_any)
    assert all(p.equal(q) for p, q in zip(module.parameters(), before.parameters(), strict=True))


def test_gradients_are_back_after_an_error() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    HostState(optimizer, part_numel=1)
    closure_of(module, optimizer, 0)()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(param.grad is not None for param in module.parameters())


def test_a_state_dict_goes_out_and_in() -> None:
    make = functools.partial(torch.optim.AdamW, lr=0.02)
    module = model()
    optimizer = make(module.parameters())
    HostState(optimizer, part_numel=100)
    optimizer.step(closure_of(module, optimizer, 0))
    resumed = copy.deepcopy(module)
    other = make(resumed.parameters())
    HostState(other, part_numel=1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((module, optimizer), (resumed, other)):
        o.step(closure_of(m, o, 1))
    assert all(p.equal(q) for p, q in zip(module.parameters(), resumed.parameters(), strict=True))


def test_schedules_made_before_and_after_go_on() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    schedules = [ScheduleLR(optimizer, Schedule(total_steps=9, warmup_steps=2))]
    HostState(optimizer, part_numel=1)
    schedules.append(ScheduleLR(optimizer, Schedule(total_steps=9, warmup_steps=2)))
    before = copy.deepcopy(module)
    optimizer.step(closure_of(module, optimizer, 0))
    for schedule in schedules:
        schedule.step()  # would warn, which is an error here, if no step had been seen
    assert not module[0].weight.equal(before[0].weight)  # type: ignore[index, operator, union-attr]


def test_optimizers_of_several_parameters_at_once_are_refused() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    for kind in (torch.optim.LBFGS, Own):
        with pytest.raises(ValueError, match=rf"{kind.__name__} is not known to treat.*is_elementwise = True"):
            HostState(kind(model().parameters(), lr=0.1))  # type: ignore[arg-type]


def test_parts_are_of_about_the_size_that_is_told() -> None:
    params = [nn.Parameter(torch.ones(size)) for size in (3, 3, 3, 9, 1, 1)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    state = HostState(optimizer, {id(params[5]): 100}, part_numel=6)
    assert [[param.numel() for param in part] for part in state._parts()] == [[3, 3], [3], [9], [1], [1]]
