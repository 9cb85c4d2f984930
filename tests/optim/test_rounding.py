"""AdamW on bfloat16 weights that loses no small update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kenotron.optim import StochasticAdamW, stochastic_round


def test_values_are_rounded_to_a_neighbour_and_right_in_the_mean() -> None:
    values = torch.tensor([1.0009765625, -1.003, 3.1415926, 1e-30, -7.77e12, 0.1])
    rounded = stochastic_round(values.repeat(200_000, 1), torch.Generator().manual_seed(0)).float()
    below, above = rounded.min(0).values, rounded.max(0).values
    bits = lambda x: x.to(torch.bfloat16).view(torch.int16).int()  # noqa: E731
    assert ((bits(above) - bits(below)).abs() == 1).all()
    assert (below < values).all() and (values < above).all()
    # Four standard errors of a coin between the neighbours.
    bar = 4 * (above - below) / 2 / math.sqrt(200_000)
    assert ((rounded.double().mean(0) - values.double()).abs() <= bar).all()


def test_what_bfloat16_has_stays_as_it_is() -> None:
    values = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    for seed in range(5):
        rounded = stochastic_round(values, torch.Generator().manual_seed(seed))
        assert torch.equal(rounded.float()[:-1], values[:-1]) and rounded[-1].isnan()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_in_float32_are_updated_as_by_torch(decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 7), nn.Linear(5, 7)
    theirs.load_state_dict(ours.state_dict())
    mine = StochasticAdamW(ours.parameters(), lr=0.01, weight_decay=decay)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
    for _ in range(20):
        inputs = torch.randn(3, 5)
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    mine.load_state_dict(torchs.state_dict())  # the same state by the same names


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_small_updates_add_up(moments: torch.dtype) -> None:
    found = {}
    for kind in (StochasticAdamW, torch.optim.AdamW):
        weights = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        settings = {"moment_dtype": moments} if kind is StochasticAdamW else {}
        optimizer = kind([weights], lr=1e-4, weight_decay=0.0, **settings)
        for _ in range(500):
            weights.grad = torch.full_like(weights, 0.01)
            optimizer.step()
        found[kind] = float(weights.detach().float().mean())
    assert found[torch.optim.AdamW] == 1.0  # each update is less than half a step of bfloat16
    assert found[StochasticAdamW] == pytest.approx(0.95, abs=1e-3)


def test_chance_depends_on_seed_step_and_place_alone() -> None:
    def trained(seed: int) -> torch.Tensor:
        weights = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = StochasticAdamW([weights], lr=1e-3, seed=seed)
        for _ in range(3):
            torch.rand(5)  # what else is drawn plays no part
            weights.grad = torch.ones_like(weights)
            optimizer.step()
        return weights.detach()

    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


def test_mistakes_are_told() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="lr=-1"):
        StochasticAdamW(weights, lr=-1)
    with pytest.raises(ValueError, match="betas"):
        StochasticAdamW(weights, betas=(1.0, 0.9))
    with pytest.raises(ValueError, match=r"moment_dtype=torch\.float16"):
        StochasticAdamW(weights, moment_dtype=torch.float16)
