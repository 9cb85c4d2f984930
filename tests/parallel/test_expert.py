"""Experts that are spread over ranks give what they give in one process: outputs, and gradients of all that is learnt."""

from __future__ import annotations

import pytest
import torch
from parallel_helpers import Ranks
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kenotron.parallel import expert
from kenotron.parallel.expert_load import ExpertLoads
from kenotron.parallel.rows import add_rows, take_rows
from kenotron.parallel.shards import Shards

WIDTH, EXPERTS = 6, 8


class Experts(nn.Module):
    """As transformers': a loop over experts, with biases, and a parameter that they share."""

    def __init__(self, num_experts: int = EXPERTS) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, 5, WIDTH))
        self.up_bias = nn.Parameter(torch.randn(num_experts, 5))
        self.down = nn.Parameter(torch.randn(num_experts, WIDTH, 5))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        assert int(router_indices.max()) < self.num_experts
        for number in range(self.num_experts):
            token, choice = torch.where(router_indices == number)
            x = torch.tanh(hidden_states[token] @ self.up[number].T + self.up_bias[number]) @ self.down[number].T
            out = out.index_add(0, token, self.norm(x) * routing_weights[token, choice, None])
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts()


def _tokens(rank: int, count: int, top_k: int, chosen: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a rank's router hands over: to random experts, or all to those from ``chosen`` on."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(count, WIDTH, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(count)]) if count else None
    if index is None:
        index = torch.empty(0, top_k, dtype=torch.long)
    if chosen is not None:
        index = (torch.arange(top_k) + chosen).expand(count, top_k).clone()
    return x, index, torch.rand(count, top_k, generator=generator)


def _in_double(tokens: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, index, weights = tokens
    return x.double(), index, weights.double()


def _spread(group: ProcessGroup, layer: Layer, **settings: float) -> expert.ExpertParallel:
    axis = expert.ExpertParallel(
        group=group, rank=group.rank(), size=group.size(), shards=Shards(), **settings  # type: ignore[arg-type]
    )  # fmt: skip
    axis.apply(layer, ["experts"])
    return axis


def spread_experts_equal_whole_ones(group: ProcessGroup, counts: list[int], top_k: int, chosen: int | None) -> None:
    layer, whole = Layer().double(), Layer().double().experts
    axis = _spread(group, layer)
    assert layer.experts.num_experts == EXPERTS and layer.experts.up.shape[0] == EXPERTS // group.size()
    every = [_in_double(_tokens(rank, counts[rank], top_k, chosen)) for rank in range(group.size())]
    expected = []
    for x, index, weights in every:
        x.requires_grad_(), weights.requires_grad_()
        out = torch.zeros_like(x)
        if len(x):
            out = whole(x, index, weights)
            out.square().sum().backward()
        expected.append((out.detach(), x.grad, weights.grad))
    x, index, weights = (t.detach().clone() for t in every[group.rank()])
    x.requires_grad_(), weights.requires_grad_()
    out = layer.experts(x, routing_weights=weights, router_indices=index)
    out.square().sum().backward()
    for found, wanted in zip((out.detach(), x.grad, weights.grad), expected[group.rank()], strict=True):
        torch.testing.assert_close(found, wanted if wanted is not None else torch.zeros_like(found), rtol=1e-10, atol=1e-10)
    start, count = axis.shards.by_name["experts.up"].experts or (0, 0)
    for name in ("up", "up_bias", "down"):
        grad, whole_grad = getattr(layer.experts, name).grad, getattr(whole, name).grad
        torch.testing.assert_close(grad, whole_grad[start : start + count], rtol=1e-10, atol=1e-10)
    shared = layer.experts.norm.weight.grad if layer.experts.norm.weight.grad is not None else torch.zeros(WIDTH).double()
    torch.distributed.all_reduce(shared, group=group)
    torch.testing.assert_close(shared, whole.norm.weight.grad, rtol=1e-10, atol=1e-10)


def capacity_drops_the_lightest_pairs(group: ProcessGroup) -> None:
    layer = Layer()
    call = expert.call_of(layer.experts)
    axis = _spread(group, layer, capacity_factor=1.0)
    axis.loads = ExpertLoads(layer, {"experts": call}, torch.device("cpu"))
    x, index, weights = _tokens(group.rank(), 8, 1, chosen=group.rank())  # each rank: one expert, which takes one
    out = layer.experts(x, routing_weights=weights, router_indices=index)
    kept = weights[:, 0] == weights.max()
    assert out[~kept].count_nonzero() == 0 and bool(out[kept].count_nonzero())
    layer.router(x)
    report = axis.loads.report(group)["experts"]
    assert float(report.dropped) == pytest.approx(7 / 8)
    wanted = torch.zeros(EXPERTS)
    wanted[: group.size()] = 1 / group.size()
    torch.testing.assert_close(report.load, wanted)
    assert float(report.imbalance) == pytest.approx(EXPERTS / group.size())
    entropy = layer.router(x).softmax(-1)
    assert 0 < float(report.router_entropy) <= float(torch.special.entr(entropy).sum(-1).max()) + 1
    assert bool(axis.loads.report(group)["experts"].load.eq(0).all()), "a report begins anew"


def no_axis_is_asked_while_silent(group: ProcessGroup) -> None:
    layer = Layer()
    axis = _spread(group, layer)
    if group.rank() == 0:  # alone
        with axis.silent():
            out = layer.experts(*_tokens(0, 3, 2, None))
        assert out.shape == (3, WIDTH) and out.count_nonzero() == 0


@pytest.mark.parametrize(
    ("counts", "top_k", "chosen"),
    [([7, 3, 5, 9], 2, None), ([4, 4, 4, 4], 8, None), ([5, 0, 6, 1], 3, None), ([3, 2, 1, 4], 1, 0), ([3, 2, 1, 4], 2, 7 - 1)],
    ids=["uneven", "every expert", "a rank without tokens", "all to the first expert", "all to the last rank"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_spread_experts_equal_whole_ones(ranks: Ranks, size: int, counts: list[int], top_k: int, chosen: int | None) -> None:
    ranks(spread_experts_equal_whole_ones, counts, top_k, chosen, size=size)


@pytest.mark.parametrize("size", [2, 4])
def test_capacity_drops_the_lightest_pairs_and_reports_them(ranks: Ranks, size: int) -> None:
    ranks(capacity_drops_the_lightest_pairs, size=size)


def test_a_probe_asks_nobody(ranks: Ranks) -> None:
    ranks(no_axis_is_asked_while_silent, size=2)


def test_rows_are_each_others_backward() -> None:
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    y = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    index, blocks = torch.tensor([0, 2, 4, 2, 3, 4]), [3, 3]
    torch.testing.assert_close(take_rows(x, index, blocks), x[index])
    torch.testing.assert_close(add_rows(y, index, blocks, 5), torch.zeros(5, 3).double().index_add(0, index, y))
    assert torch.autograd.gradcheck(lambda x: take_rows(x, index, blocks), x)
    assert torch.autograd.gradcheck(lambda y: add_rows(y, index, blocks, 5), y)
    assert torch.autograd.gradgradcheck(lambda y: add_rows(y, index, blocks, 5), y)


def test_sums_of_halves_are_made_in_float32() -> None:
    many = torch.full((4096, 1), 0.001, dtype=torch.bfloat16)
    found = add_rows(many, torch.zeros(4096, dtype=torch.long), [1] * 4096, 1)
    assert float(found) == pytest.approx(4096 * float(many[0]), rel=1e-2)  # in bfloat16 it would stay at 0.25


def test_experts_are_found_by_what_they_are() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = Layer(), nn.Linear(2, 2)

    assert list(expert.find_experts(Model())) == ["layer.experts"]


def test_experts_that_cannot_be_spread_are_refused() -> None:
    layer = Layer()
    with pytest.raises(ValueError, match=r"experts has 8 experts, which ep=3 does not divide.*\[1, 2, 4, 8\]"):
        expert.check_experts(layer, expert.find_experts(layer), 3)
    with pytest.raises(ValueError, match=r"ep=2, but Linear has no experts modules"):
        expert.check_experts(nn.Linear(2, 2), {}, 2)
    half = Layer().half()
    with pytest.raises(ValueError, match="float16"):
        expert.check_experts(half, expert.find_experts(half), 2)
