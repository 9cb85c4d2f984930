"""ZeRO 1: an update that ranks share is the same update, parameters stay what they were, and state is divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kenotron.optim.zero import ShardedUpdate, granularity_of
from kenotron.parallel.buckets import Rows, rows_of
from kenotron.testing import RankPool


class Replacing(Optimizer):
    """Written as old ones are: what it updates is replaced."""

    is_elementwise = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data = param.data - group["lr"] * param.grad


class Twice(Optimizer):
    """Runs its closure twice, as sharpness-aware ones do, and moves between the two calls."""

    is_elementwise = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=0.1)
        return loss


class Jumps(torch.optim.SGD):
    """Looks at all parameters together: nobody knows that."""

    def step(self, closure: Any = None) -> Any:
        norm = sum(p.detach().norm() for group in self.param_groups for p in group["params"] if p.grad is not None)
        for group in self.param_groups:
            group["lr"] = float(0.01 * norm)
        return super().step(closure)


KINDS: dict[str, tuple[str, Callable[[Any], Optimizer]]] = {
    "AdamW": ("rows", lambda p: torch.optim.AdamW(p, lr=0.02)),
    "AdamW fused": ("rows", lambda p: torch.optim.AdamW(p, lr=0.02, fused=True, amsgrad=True)),
    "SGD": ("rows", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1)),
    "Adagrad": ("rows", lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.1)),
    "ASGD": ("rows", lambda p: torch.optim.ASGD(p, lr=0.02)),
    "Rprop": ("rows", lambda p: torch.optim.Rprop(p, lr=0.02)),
    "Replacing": ("rows", Replacing),
    "Twice": ("rows", Twice),
    "Adafactor": ("parameters", lambda p: torch.optim.Adafactor(p, lr=0.02)),
    "Jumps": ("none", lambda p: Jumps(p, lr=0.02)),
}


class Odd(nn.Module):
    """Sizes that nothing divides, a scalar, one row, no contiguous memory, a frozen weight and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.conv = nn.Conv2d(1, 3, 2).to(memory_format=torch.channels_last)
        self.one = nn.Linear(12, 1)
        self.wide = nn.Linear(12, 7, bias=False)
        self.tall = nn.Parameter(torch.randn(7, 5).t().mul(0.3))
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x).flatten(1) * self.scale
        loss: Tensor = (self.frozen((self.wide(hidden) + self.one(hidden)) @ self.tall.t())).square().mean()
        return loss


def train(make: Callable[[Any], Optimizer], sharded: bool) -> tuple[nn.Module, Optimizer, list[float], bool]:
    torch.manual_seed(0)
    module = Odd()
    before = dict(module.named_parameters())
    optimizer = make(module.parameters())
    if sharded:
        names = {id(param): name for name, param in before.items()}
        world = dist.group.WORLD
        assert world is not None
        ShardedUpdate(optimizer, names, lambda _: world)
    losses = []
    for step in range(4):
        x = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(step))

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = module(x)
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure) or closure()))
    is_same = all(before[name] is param for name, param in module.named_parameters())
    return module, optimizer, losses, is_same


def compare() -> dict[str, Any]:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, (granularity, make) in KINDS.items():
        module, optimizer, losses, is_same = train(make, sharded=True)
        plain, reference, expected, _ = train(make, sharded=False)
        found[name] = {
            "granularity": granularity_of(optimizer) == granularity,
            "losses": alike(name, torch.tensor(losses), torch.tensor(expected)),
            "weights": all(alike(name, p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True)),
            "gradients": all(
                (p.grad is None) == (q.grad is None) and (p.grad is None or q.grad is None or alike(name, p.grad, q.grad))
                for p, q in zip(module.parameters(), plain.parameters(), strict=True)
            ),
            "same objects": is_same,
            "state": (size_of(optimizer), size_of(reference)),
        }
    dist.destroy_process_group()
    return found


def alike(name: str, a: Tensor, b: Tensor) -> bool:
    """Compare to the bit; torch's fused kernel on a CPU rounds the last few elements of a tensor in another way."""
    return a.allclose(b, rtol=1e-5, atol=1e-7) if "fused" in name else a.equal(b)


def size_of(optimizer: Optimizer) -> int:
    """Return the elements of all large state."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() for tensor in tensors if tensor.ndim)


def test_an_update_that_ranks_share_is_the_same_to_the_bit(optim_pool: RankPool) -> None:
    ranks = optim_pool.run(compare, 3)
    for name, (granularity, _) in KINDS.items():
        held = []
        for found in ranks:
            state = found[name].pop("state")
            held.append(state[0])
            assert all(found[name].values()), f"{name}: {found[name]}"
            whole = state[1]
            if granularity == "none":
                assert state[0] == whole
            elif whole:
                assert state[0] < whole
        if granularity == "rows" and whole:
            # Each element of the state lies on one rank; a scalar's moments are 0-dimensional and not counted.
            assert sum(held) == whole, name


def after_an_error() -> list[tuple[int, ...]]:
    dist.init_process_group("gloo")
    module = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    world = dist.group.WORLD
    assert world is not None
    update = ShardedUpdate(optimizer, {id(p): n for n, p in module.named_parameters()}, lambda _: world)

    def fails(*_: Any) -> None:
        raise RuntimeError("in the update")

    module(torch.ones(1, 4)).sum().backward()
    optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the update"):
        optimizer.step()
    shapes = [tuple(param.shape) for param in module.parameters()]
    update.restore()
    dist.destroy_process_group()
    return [*shapes, *(tuple(param.shape) for param in module.parameters())]


def test_parameters_are_whole_again_after_an_error(optim_pool: RankPool) -> None:
    for *parts, weight, bias in optim_pool.run(after_an_error, 2):
        assert parts != [(3, 4), (3,)], "the update had begun"
        assert (weight, bias) == ((3, 4), (3,))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_are_divided_evenly_and_cover_all(size: int, ranks: int) -> None:
    for offset in range(ranks):
        found = rows_of(size, ranks, offset)
        assert sum(rows.length for rows in found) == size
        assert max(rows.length for rows in found) - min(rows.length for rows in found) <= 1
        covered = sorted(row for rows in found for row in range(rows.start, rows.start + rows.length))
        assert covered == list(range(size))
    assert Rows(1, 2).of(torch.arange(4)).tolist() == [1, 2]
