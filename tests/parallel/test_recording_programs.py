"""Random programs of tensors, recorded and replayed, against the same programs run at once: equal bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kenotron.parallel.recording import Place, recording

ROWS, COLUMNS = 6, 4


def make(generator: random.Random) -> Tensor:
    return generator.choice(
        [
            lambda: torch.randn(ROWS, COLUMNS),
            lambda: torch.zeros(ROWS, COLUMNS),
            lambda: torch.full((ROWS, COLUMNS), 0.5),
            lambda: torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS) / 7,
            lambda: torch.linspace(-1, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS),
            lambda: torch.zeros(ROWS, COLUMNS) + torch.tensor([float(column) for column in range(COLUMNS)]),
            lambda: torch.eye(ROWS, COLUMNS),
            lambda: nn.Linear(COLUMNS, ROWS).weight.data,
            lambda: nn.Embedding(ROWS, COLUMNS).weight.detach(),
            lambda: torch.rand(COLUMNS, ROWS).T,
        ]
    )()


def part_of(x: Tensor, generator: random.Random) -> Tensor:
    """Return a view: of all, of rows, of columns, or of every other one."""
    begin = generator.randrange(ROWS)
    return generator.choice(
        [
            lambda: x,
            lambda: x[begin : begin + 2],
            lambda: x[:, ::2],
            lambda: x.T[1:],
            lambda: x.diagonal(),
            lambda: x.detach().narrow(0, 1, 3),
            lambda: x.unsqueeze(0)[0, begin],
        ]
    )()


def change(x: Tensor, y: Tensor, generator: random.Random) -> None:
    """Change a tensor, or a part of it, in place."""
    part = part_of(x, generator)
    number = generator.choice([0.5, -1.25, 2.0])
    changes: list[Callable[[], object]] = [
        lambda: part.mul_(number),
        lambda: part.add_(part.mean()),
        lambda: part.normal_(0, 0.1),
        lambda: part.uniform_(-1, 1),
        lambda: part.fill_(number),
        lambda: part.clamp_(-1, 1),
        lambda: part.copy_(part.flip(0) * number),
        lambda: x.copy_(y),
        lambda: x.copy_(x / (1 + x.norm(dim=1, keepdim=True))),
        lambda: x.add_(y, alpha=number).tanh_(),
        lambda: x.masked_fill_(y > 0, number),
        lambda: x.index_fill_(0, torch.tensor([0, 2]), number),
        lambda: x.__setitem__((slice(None), 1), y[:, 0]),
        lambda: x.__setitem__(x > 1, 1.0),
        lambda: x.__setitem__(torch.randperm(ROWS), y),
        lambda: x.bernoulli_(0.5),
        lambda: setattr(x, "data", torch.where(x > y, x, y)),
        lambda: share(x, y * number),
        lambda: nn.init.trunc_normal_(x, std=0.5, a=-0.5, b=0.5),
        lambda: nn.init.orthogonal_(x),
        lambda: nn.init.xavier_uniform_(x),
        lambda: nn.init.kaiming_normal_(x, nonlinearity="relu"),
        lambda: nn.init.sparse_(x, 0.3),
        lambda: x.mul_(float(y.abs().max().clamp(max=2))),
        lambda: x.zero_() if y.sum() > 0 else x.add_(1),
        lambda: x.fill_(y.tolist()[0][0]),
        lambda: torch.add(x, y, out=x),
        lambda: torch._foreach_mul_([x, part_of(y, generator)], number),
    ]
    with torch.no_grad():
        generator.choice(changes)()


def share(x: Tensor, y: Tensor) -> None:
    """Let two tensors have one memory, and change it through the other."""
    x.data = y
    y[1:].add_(x[:1])


def combine(x: Tensor, y: Tensor, generator: random.Random) -> Tensor:
    return generator.choice(
        [
            lambda: x + y,
            lambda: x @ (y.T @ x),
            lambda: torch.cat([x[:2], y[2:]]),
            lambda: torch.stack([x, y]).mean(0),
            lambda: torch.softmax(x, 0),
            lambda: x.cumsum(1),
            lambda: x.sort(0).values,
            lambda: x.clone(),
            lambda: x.double().float(),
            lambda: x.repeat(2, 1)[ROWS:],
            lambda: torch.linalg.qr(x)[0],
            lambda: torch.normal(x, 0.1),
            lambda: torch.einsum("rc,rd->rd", x, y),
            lambda: torch.empty_like(x).copy_(y),
        ]
    )()


def run_program(seed: int) -> list[Tensor]:
    """Return the tensors that a program has made; the same operators for the same seed, whether recorded or not."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    tensors = [make(generator) for _ in range(3)]
    for _ in range(generator.randrange(3, 14)):
        x, y = generator.choice(tensors), generator.choice(tensors)
        match generator.randrange(6):
            case 0:
                tensors.append(make(generator))
            case 1:
                tensors.append(combine(x, y, generator))
            case _:
                change(x, y, generator)
    return tensors


@pytest.mark.parametrize(("first", "count"), [(0, 200), pytest.param(200, 1500, marks=pytest.mark.slow)])
def test_recorded_programs_have_the_values_of_those_that_ran_at_once(first: int, count: int) -> None:
    num_run = 0
    for seed in range(first, first + count):
        try:
            expected, state = run_program(seed), torch.get_rng_state()
        except RuntimeError:  # torch refuses it: memory that is written and read at once
            continue
        num_run += 1
        with recording():
            recorded = run_program(seed)
        assert torch.equal(state, torch.get_rng_state()), f"program {seed} leaves the generator elsewhere"
        for index, (want, tensor) in enumerate(zip(expected, recorded, strict=True)):
            place = Place.of(tensor)
            found = tensor if place is None else place.value()
            assert torch.equal(found.nan_to_num(7), want.nan_to_num(7)), f"program {seed}, tensor {index}: {found} for {want}"
    assert num_run > 0.8 * count
