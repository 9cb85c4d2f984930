"""What each collective does forward and backward, against the same computed by one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kenotron.parallel import collectives as C

SIZES = [2, 4]


def _input(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return small integers, whose sums are exact in bfloat16 too, different for every rank and known to all."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def _slice(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return x.tensor_split(group.size(), dim)[group.rank()]


def _check(out: Tensor, expected: Tensor, x: Tensor, grad: Tensor, expected_grad: Tensor) -> None:
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=0)
    (actual,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(actual, expected_grad, rtol=0, atol=0)


def copy_and_reduce(group: ProcessGroup, dtype: torch.dtype) -> None:
    every = [_input(r, (3, 5), dtype) for r in range(group.size())]
    total = torch.stack(every).sum(0)
    mine = every[group.rank()].clone().requires_grad_()
    _check(C.copy_to(mine, group), every[group.rank()], mine, every[group.rank()], total)
    _check(C.reduce_from(mine, group), total, mine, total, total)
    torch.testing.assert_close(mine.detach(), every[group.rank()])  # the input was not touched


def gather_and_scatter(group: ProcessGroup, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    every = [_input(r, shape, dtype) for r in range(group.size())]
    whole, total, size = every[0], torch.stack(every).sum(0), shape[dim]
    own = _slice(whole, dim, group).clone().requires_grad_()
    gathered = C.gather_from(own, dim, group, grad="slice", size=size)
    _check(gathered, whole, own, total, _slice(total, dim, group))
    gathered = C.gather_from(own, dim, group, grad="reduce_scatter", size=size)
    _check(gathered, whole, own, every[group.rank()], _slice(total, dim, group))
    every[0].requires_grad_()
    _check(C.scatter_to(every[0], dim, group), own.detach(), every[0], _slice(total, dim, group), total.detach())
    mine = every[group.rank()].detach().clone().requires_grad_()
    reduced = C.reduce_scatter_to(mine, dim, group)
    _check(reduced, _slice(total, dim, group).detach(), mine, own.detach(), whole.detach())


def equal_slices_need_no_size(group: ProcessGroup) -> None:
    whole = _input(0, (2, 8, 3))
    torch.testing.assert_close(C.gather_from(_slice(whole, 1, group), -2, group, grad="slice"), whole)


def no_result_aliases_its_input(group: ProcessGroup) -> None:
    for dim in (0, 1):
        x = _input(group.rank(), (8, 8)).requires_grad_()
        before = x.detach().clone()
        for out in (
            C.reduce_from(x, group),
            C.gather_from(x, dim, group, grad="slice"),
            C.scatter_to(x, dim, group),
            C.reduce_scatter_to(x, dim, group),
        ):
            out.mul_(2).sum().backward()  # autograd forbids this on views that a function returned
        torch.testing.assert_close(x.detach(), before)


def gradients_of_gradients(group: ProcessGroup) -> None:
    """The gradient penalty of y = w·(sum of the ranks' x²) is the one that a single process computes."""
    every = [_input(r, (4,)).double() for r in range(group.size())]
    w = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    x = every[group.rank()].clone().requires_grad_()
    y = (C.reduce_from(x.square(), group) * w).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    C.reduce_from(grad.square().sum(), group).backward()
    assert w.grad is not None
    expected = sum(2 * 2 * e * 2 * e * 3.0 for e in every).sum()  # d/dw Σ (2·w·x)²
    torch.testing.assert_close(w.grad, expected)  # summed already: the backward of reduce_from is a copy_to
    torch.testing.assert_close(x.grad, 8 * every[group.rank()] * 9.0)


def _column_row(x: Tensor, w: Tensor, v: Tensor, group: ProcessGroup) -> Tensor:
    """A tensor-parallel MLP in which the sequence is sharded outside."""
    h = C.gather_from(x, 1, group, grad="reduce_scatter").mul(1.5) @ w
    h = C.reduce_scatter_to(h.tanh() @ v, 1, group)
    return C.reduce_from(C.copy_to(C.gather_from(h, 1, group, grad="slice"), group) * 0.5, group).sum()


def compiled(group: ProcessGroup) -> None:
    generator = torch.Generator().manual_seed(group.rank())
    x, w, v = (torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 3, 4), (4, 6), (6, 4)))
    eager = torch.autograd.grad(_column_row(x, w, v, group), (x, w, v))
    step = torch.compile(_column_row, backend="aot_eager")
    for _ in range(2):
        for expected, actual in zip(eager, torch.autograd.grad(step(x, w, v, group), (x, w, v)), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_sums_gradients_and_reduce_sums_values(ranks, size, dtype):
    ranks(copy_and_reduce, dtype, size=size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((8, 3), 0), ((2, 8, 3), 1), ((1, 8, 3), 1), ((3, 4), -1), ((2, 7, 3), 1), ((5,), 0), ((2, 3, 2), 1), ((0, 4), 1)],
    ids=["first", "middle", "batch-of-one", "last", "uneven", "uneven-vector", "fewer-than-ranks", "empty"],
)
def test_slices_are_those_of_tensor_split_in_both_directions(ranks, size, shape, dim):
    ranks(gather_and_scatter, shape, dim, torch.float32, size=size)


def test_bfloat16_slices(ranks):
    ranks(gather_and_scatter, (2, 7, 3), 1, torch.bfloat16)


def test_equal_slices_are_gathered_without_a_size(ranks):
    ranks(equal_slices_need_no_size)


def test_inputs_stay_untouched_when_results_are_changed_in_place(ranks):
    ranks(no_result_aliases_its_input)


def test_collectives_are_differentiable_twice(ranks):
    ranks(gradients_of_gradients)


def test_collectives_survive_torch_compile(ranks):
    ranks(compiled)


@pytest.mark.parametrize("size", [0, 1, 3, 7, 8])
def test_split_bounds_are_those_of_tensor_split(size):
    pieces = torch.arange(size).tensor_split(4)
    for index, piece in enumerate(pieces):
        start, length = C.split_bounds(size, 4, index)
        assert torch.arange(size)[start : start + length].equal(piece)


def test_one_process_gets_its_own_tensor_back():
    x = torch.ones(3, requires_grad=True)
    assert C.copy_to(x, None) is x
    assert C.reduce_from(x, None) is x
    assert C.gather_from(x, 0, None, grad="slice") is x
    assert C.scatter_to(x, 0, None) is x
    assert C.reduce_scatter_to(x, 0, None) is x
    assert C.all_gather_stack(x, None).shape == (1, 3)
