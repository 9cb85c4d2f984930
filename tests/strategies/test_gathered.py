"""ZeRO 3: a step may change weights, use some of them on some ranks only; what can't be right is an error on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategy_helpers import DP2, Block, Classifier, Task, close, data_rank, fit, fit_like_one_process
from torch import Tensor, nn

from kenotron.testing import RankPool

ZERO3 = (2, {"zero_stage": 3})


class Momentum(Classifier):
    """A second encoder follows the first one, by every way to write; a weight is clipped before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 16).requires_grad_(False)
        self.second = nn.Linear(8, 16)
        self.third = nn.Linear(8, 16).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.key.weight.lerp_(self.embed.weight, 0.5)
                self.key.bias.data = self.key.bias.data * 0.5 + self.embed.bias.data * 0.5
                self.second.weight.data.clamp_(-0.1, 0.1)
                torch._foreach_mul_(list(self.third.parameters()), 0.9)
        x, y = batch
        away = (self.embed(x) - self.key(x) + self.second(x) - self.third(x)).square().mean()
        return F.cross_entropy(self(x), y) + away


def test_what_a_step_writes_into_weights_stays(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(pool, Momentum, ZERO3, tmp_path, rows=24, trainer={"max_epochs": 1})


class Heads(Classifier):
    """A head for each rank's task; one is used by none. Weight decay would move what has a gradient of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(16, 3), nn.Linear(16, 3), nn.Linear(16, 3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.embed(x) + self.shift
        if data_rank(self.trainer)[1] == 1:
            half = len(x) // 2
            return (F.cross_entropy(self.a(hidden[:half]), y[:half]) + F.cross_entropy(self.b(hidden[half:]), y[half:])) / 2
        head = (self.a, self.b)[data_rank(self.trainer)[0]]
        return F.cross_entropy(head(hidden), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-6, weight_decay=1.0)


def test_ranks_may_use_different_parameters_of_one_group(pool: RankPool, tmp_path: Path) -> None:
    expected = pool.run(fit, 1, Task(Heads, None, rows=24, val_rows=0))[0]
    for found in pool.run(fit, 2, Task(Heads, ZERO3[1], rows=24, val_rows=0, folder=str(tmp_path))):
        close(found["weights"], expected["weights"], 1e-4)


class Towers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.shift
        for layer in (*(self.tower if data_rank(self.trainer)[0] else ()), *self.layers):
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class LaterTowers(Towers):
    """Their order differs from the sixth batch on, not their number."""

    def forward(self, x: Tensor) -> Tensor:
        turned = self.trainer.global_step >= 5 and data_rank(self.trainer)[0]
        x = self.embed(x) + self.shift
        for layer in reversed(self.layers) if turned else self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class Penalty(Classifier):
    def loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()


class Assigned(Classifier):
    def on_train_batch_end(self, *args: Any) -> None:
        for param in self.layers.parameters():
            param.data = param.data * 0.5


def fails(task: Task) -> str:
    try:
        fit(task)
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Towers, "'tower.0' where rank 0 runs 'layers.0'"),
        (LaterTowers, "every rank must run the same layers in the same order"),
        (Penalty, "second derivatives"),
        (Assigned, "layers.0.norm.weight.data = … was set between steps"),
    ],
    ids=["layers", "order", "second-derivatives", "assigned"],
)
def test_what_can_not_be_right_is_an_error_on_all_ranks(pool: RankPool, module: Any, text: str) -> None:
    task = Task(module, ZERO3[1], rows=64, val_rows=0, with_weights=False)
    found = pool.run(fails, DP2[0], task)
    assert any(text in each for each in found), found
    assert "trained" not in found
