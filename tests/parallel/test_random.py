"""Which dropout masks are alike on ranks, and which are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kenotron.layout import ParallelLayout
from kenotron.parallel.apply import Request, parallelize
from kenotron.parallel.plan import ParallelPlan
from kenotron.parallel.random import OwnStream, draws_masks
from kenotron.parallel.recompute import Recompute
from kenotron.testing import RankPool


def test_ones_own_numbers_differ_by_rank_and_leave_the_common_ones_alike() -> None:
    streams = [OwnStream(rank, torch.device("cpu")) for rank in range(3)]
    drawn, after = [], []
    for stream in streams:
        torch.manual_seed(5)
        torch.rand(3)
        with stream.entered():
            drawn.append(torch.rand(4).tolist())
            stream.enter()  # once is enough
        after.append(torch.rand(4).tolist())
    assert len({tuple(numbers) for numbers in drawn}) == 3
    assert after[0] == after[1] == after[2]
    assert drawn[0] != after[0]


def test_the_common_stream_moves_on_so_that_the_next_time_is_another() -> None:
    stream, drawn = OwnStream(0, torch.device("cpu")), []
    torch.manual_seed(5)
    for _ in range(3):
        with stream.entered():
            drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3


def test_dropout_is_found_as_a_layer_and_as_a_rate() -> None:
    class Attention(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.attention_dropout = rate

    assert draws_masks(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)))
    assert draws_masks(nn.Sequential(Attention(0.1)))
    assert not draws_masks(nn.Sequential(nn.Dropout(0.0), Attention(0.0), nn.Linear(1, 1)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(8, 64, bias=False), nn.Dropout(0.5)
        self.down, self.outer = nn.Linear(64, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.down(self.inner(self.up(x))))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), MLP()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def masks(sequence_parallel: bool, recompute: bool) -> dict[str, Any]:
    """Return what two steps zero between split linears and after them, and the gradients, on this rank of tp=2."""
    dist.init_process_group("gloo")
    try:
        torch.manual_seed(1)
        root, layout = Blocks(), ParallelLayout(dp=1, tp=2).resolve(2)
        plan = ParallelPlan(tensor={"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise"}, blocks="layers")
        request = Request(
            layout=layout,
            device=torch.device("cpu"),
            plan=plan,
            sequence_parallel=sequence_parallel,
            recompute=Recompute(mode="full" if recompute else "none"),
        )
        parallelize(root, layout.device_mesh("cpu"), request)
        found: dict[str, list[Any]] = {"inner": [], "outer": []}
        for kind in found:
            for layer in root.layers:
                dropout = getattr(layer.mlp, kind)  # type: ignore[union-attr]
                keep = found[kind].append
                dropout.register_forward_hook(lambda m, args, out, keep=keep: keep((out == 0).tolist()) if m.training else None)
        torch.manual_seed(2)
        out = None
        for _ in range(2):
            x = torch.randn(2, 6, 8)
            out = root(x)
            out.square().sum().backward()
        root.eval()
        with torch.no_grad():
            evaluated = root(torch.ones(2, 6, 8)).tolist()
        assert out is not None
        grads = [p.grad.tolist() for p in root.parameters()]  # type: ignore[union-attr]
        return {**found, "out": out.tolist(), "evaluated": evaluated, "next": torch.rand(2).tolist(), "grads": grads}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def pool() -> Any:
    with RankPool(2) as processes:
        yield processes


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_masks_differ_where_activations_are_split_and_nowhere_else(pool: RankPool, sequence_parallel: bool) -> None:
    one, other = pool.run(masks, 2, sequence_parallel, False)
    for mine, theirs in zip(one["inner"], other["inner"], strict=True):
        assert mine != theirs
    # With sequence parallelism what follows the split linears is a slice of the sequence on each rank.
    same = [mine == theirs for mine, theirs in zip(one["outer"], other["outer"], strict=True)]
    assert not any(same) if sequence_parallel else all(same)
    assert len({str(mask) for mask in one["inner"]}) == len(one["inner"]) == 4
    for name in ("out", "evaluated", "next"):
        assert one[name] == other[name], name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputed_masks_are_those_of_the_first_run(pool: RankPool, sequence_parallel: bool) -> None:
    plain = pool.run(masks, 2, sequence_parallel, False)
    again = pool.run(masks, 2, sequence_parallel, True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close([torch.tensor(g) for g in one["grads"]], [torch.tensor(g) for g in other["grads"]])
        assert one["next"] == other["next"]
