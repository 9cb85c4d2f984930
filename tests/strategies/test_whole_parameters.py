"""Under ZeRO 1, the default, a module between steps is what its author wrote: what works under ``ddp`` works alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from strategy_helpers import Classifier, Task, close, fit, fit_like_one_process, make_trainer, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kenotron.testing import RankPool


class Habits(Classifier):
    """What people do beside training: targets moved in three ways, gradient penalties, norms, copies, their own optimizer."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.target, self.momentum = copy.deepcopy(self.embed), copy.deepcopy(self.embed)
        self.target.requires_grad_(False)
        self.momentum.requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.watched = [self.embed.weight, self.head.weight]
        self.shift._is_special = True  # type: ignore[attr-defined]
        self.calls = 0
        self.embed.weight.register_hook(self._count)
        self.made = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters() if p.requires_grad and not hasattr(p, "_is_special")]},
                {"params": [self.shift], "weight_decay": 0.5},
            ],
            lr=0.02,
        )
        self.seen: list[Any] = []

    def _count(self, grad: Tensor) -> None:
        self.calls += 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        with torch.no_grad():
            self.momentum.weight.mul_(0.9).add_(self.embed.weight, alpha=0.1)
            self.head.bias.clamp_(-0.01, 0.01)
        x = self.heads[batch_idx % 2](x).requires_grad_()
        loss = self.loss((x, y))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + slope.square().mean() + 0.01 * torch.stack([w.square().mean() for w in self.watched]).sum()
        loss = loss + (self.target(x) - self.momentum(x)).square().mean()
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [float(p.grad.norm()) for p in self.parameters() if p.grad is not None]
        self.seen.append([*norms, float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5))])

    def on_train_batch_end(self, *_: Any) -> None:
        for target, online in zip(self.target.parameters(), self.embed.parameters(), strict=True):
            target.data = 0.9 * target.data + 0.1 * online.data
        self.seen.append([float(p.detach().norm()) for p in self.parameters()] + [self.calls])
        self.seen.append([float(p.square().sum()) for p in copy.deepcopy(self.layers).parameters()])

    def configure_optimizers(self) -> Any:
        return self.made


class OnRankZero(L.Callback):
    """Runs the module on one rank, as samplers do that draw pictures."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.seen.append([float(pl_module(torch.ones(1, 8)).norm())])


@pytest.mark.parametrize("strategy", [{}, {"dp_replicate": 2}], ids=["zero1", "replicated"])
def test_habits_of_ddp_train_as_under_ddp(pool: RankPool, strategy: dict[str, Any], tmp_path: Path) -> None:
    task: dict[str, Any] = {"rows": 24, "val_rows": 0, "callbacks": [OnRankZero]}
    expected = pool.run(fit, 2, Task(Habits, "ddp_find_unused_parameters_true", folder=str(tmp_path), **task))
    found = pool.run(fit, 2, Task(Habits, strategy, folder=str(tmp_path), **task))
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        for key in ("losses", "metrics", "seen", "weights"):
            close(one[key], other[key], 1e-6, where=f"rank {rank} {key}")


def test_averaged_weights_are_those_of_one_process(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(
        pool, Classifier, (2, {}), tmp_path, rows=24, val_rows=0, callbacks=[average], trainer={"max_epochs": 3}
    )


def average() -> L.Callback:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


class Normalised(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.out(self.norm(batch[0])).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.norm.running_mean is not None
        self.seen.append(self.norm.running_mean.clone())
        self.out(self.norm(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def validated_and_kept(strategy: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    quiet()
    L.seed_everything(1, verbose=False)
    rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 3, 4)
    module = Normalised()
    trainer = make_trainer(strategy, max_epochs=1, use_distributed_sampler=True, val_check_interval=2)
    trainer.fit(module, DataLoader(TensorDataset(rows), 4), DataLoader(TensorDataset(rows), 4))
    return module.seen, {name: value.clone() for name, value in module.state_dict().items()}


def test_running_statistics_are_those_of_the_first_rank(pool: RankPool) -> None:
    (first, kept), (second, also_kept) = pool.run(validated_and_kept, 2, {})
    for one, other in zip(first, second, strict=True):
        assert one.equal(other)
    assert not first[0].equal(first[-1])
    for name, value in kept.items():
        assert type(value) is Tensor
        assert value.equal(also_kept[name]), name
