"""Async TP: the compiler finds the pairs of transfer and product, and what it makes of them is the same.

Its operators run on CUDA alone; here they are what torch defines them to mean, by plain collectives and products.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
import torch.nn.functional as F
from strategy_helpers import SLOW
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import kenotron
from kenotron.parallel import collectives, overlap
from kenotron.parallel._torch import OVERLAP_OPTION
from kenotron.testing import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import parity


@contextlib.contextmanager
def defined_on_cpu() -> Iterator[list[str]]:
    """Yield a list that is told of each joined operator that runs."""
    calls: list[str] = []

    def gather_multiply(shard: Tensor, others: list[Tensor], dim: int, group: str, *, return_A: bool = True) -> Any:
        calls.append(f"gather, {len(others)} products")
        return symmetric._fused_all_gather_matmul_fallback(shard, others, dim, group, return_A=return_A)

    def multiply_scatter(a: Tensor, b: Tensor, op: str, dim: int, group: str) -> Tensor:
        calls.append("product, reduce-scatter")
        return symmetric._fused_matmul_reduce_scatter_fallback(a, b, op, dim, group)

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", gather_multiply, "CPU")
    library.impl("fused_matmul_reduce_scatter", multiply_scatter, "CPU")
    is_available, dist.is_nccl_available = dist.is_nccl_available, lambda: True  # what the compiler asks
    try:
        with symmetric._test_mode():
            yield calls
    finally:
        dist.is_nccl_available = is_available
        library._destroy()


class MLP(nn.Module):
    """A sequence-parallel MLP, its two entry projections apart or fused; this rank's rows and columns."""

    def __init__(self, group: ProcessGroup, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(group.rank())
        self.group = group
        self.norm = nn.LayerNorm(16)
        self.entry = nn.ModuleList(nn.Linear(16, size, bias=False) for size in ((64,) if fused else (32, 32)))
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = collectives.gather_from(self.norm(x), 1, self.group, grad="reduce_scatter")
        gate, up = torch.cat([linear(whole) for linear in self.entry], -1).chunk(2, -1)
        return x + collectives.reduce_scatter_to(self.down(F.silu(gate) * up), 1, self.group)


def joined(fused: bool) -> list[str]:
    """Check values and gradients; return which operators ran."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    mlp = MLP(group, fused=fused)
    x = torch.randn(2, 4, 16, requires_grad=True)
    inputs = [x, *mlp.parameters()]
    expected = torch.autograd.grad(mlp(x).square().sum(), inputs)
    with defined_on_cpu() as calls:
        step = torch.compile(mlp.forward, options={OVERLAP_OPTION: True})
        found = torch.autograd.grad(step(x).square().sum(), inputs)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()
    return calls


@pytest.mark.parametrize(
    ("fused", "operators"),
    [
        (True, ["gather, 1 products", "product, reduce-scatter", "gather, 1 products", "product, reduce-scatter"]),
        pytest.param(False, ["gather, 2 products", "product, reduce-scatter", "gather, 1 products"], marks=SLOW),
    ],
)
def test_transfers_and_products_become_one(pool: RankPool, fused: bool, operators: list[str]) -> None:
    assert pool.run(joined, 2, fused) == [operators, operators]


def train(*task: Any) -> tuple[dict[str, Any], int]:
    """Train as ``bench/parity.py`` does, and count the joined operators that ran."""
    check, overlap.check_async_tp = overlap.check_async_tp, lambda device, tp: None
    try:
        with defined_on_cpu() as calls:
            return parity.train(*task), len(calls)
    finally:
        overlap.check_async_tp = check


@SLOW
def test_it_trains_like_one_process(pool: RankPool, tmp_path: Path) -> None:
    model, folders = parity.own("qwen3"), [str(tmp_path / name) for name in ("one", "two")]
    reference = pool.run(parity.train, 1, {}, model, {}, folders[0])[0]
    strategy = {"tp": 2, "sequence_parallel": True, "compile": True, "async_tp": True}
    for found, num_joined in pool.run(train, 2, strategy, model, {}, folders[1], timeout_s=170):
        deviations = parity.deviations(found, reference, folders[1], folders[0])
        assert max(deviations["loss"], deviations["norm"]) <= parity.LOSS_BAR
        assert deviations["weight"] <= parity.WEIGHT_BAR
        assert num_joined >= 4 * 2 * len(found["losses"])  # in attention and MLP of each block, in each step


def test_it_is_refused_without_gpus_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="async_tp=True works through memory that GPUs share, and this rank is on cpu"):
        overlap.check_async_tp(torch.device("cpu"), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="tp=4 over 2 visible GPUs"):
        overlap.check_async_tp(torch.device("cuda", 0), 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    with pytest.raises(ValueError, match="GPU 0 can't read the memory of GPU 1"):
        overlap.check_async_tp(torch.device("cuda", 0), 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    overlap.check_async_tp(torch.device("cuda", 0), 2)


@pytest.mark.parametrize("settings", [{"tp": 2, "sequence_parallel": True}, {"tp": 2, "compile": True}])
def test_it_is_refused_without_what_it_joins(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"async_tp=True with compile=.*Set both to True"):
        kenotron.KenotronStrategy(async_tp=True, **settings)
