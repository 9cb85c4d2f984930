"""State that differs between ranks: the checkpoint has that of the rank which has it, or the save is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from strategy_helpers import PP2, Classifier, Task, loaders, make_trainer
from torch import Tensor

import kenotron
from kenotron import checkpoint as checkpoints
from kenotron.testing import RankPool

INTERLEAVED = (2, {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "microbatches": 4})
ZBV = (2, {"pp": 2, "virtual_stages": 2, "schedule": "zbv", "microbatches": 4, "zero_stage": 0})


class AfterLoss(Classifier):
    """A running mean of the loss, and a list of losses that a hook saves: only the last stage has them."""

    mean_loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_loss", torch.ones(()))
        self.history: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if self.training:
            self.mean_loss.lerp_(loss.detach(), 0.5)
            self.history.append(1.0)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = list(self.history)


class Collects(L.Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.count = len(pl_module.history)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def save(strategy: Any, path: str) -> float:
    L.seed_everything(1, verbose=False)
    module = AfterLoss()
    trainer = make_trainer(strategy, [Collects()], max_epochs=1)
    train, _ = loaders(trainer, Task(AfterLoss, strategy))
    trainer.fit(module, train)
    trainer.save_checkpoint(path)
    trainer.strategy.barrier()
    return float(module.mean_loss)


@pytest.mark.parametrize("layout", [PP2, INTERLEAVED, ZBV], ids=["1f1b", "interleaved", "zbv"])
def test_what_the_last_stage_has_is_saved(pool: RankPool, layout: Any, tmp_path: Path) -> None:
    ranks, strategy = layout
    means = pool.run(save, ranks, strategy, str(tmp_path / "last"))
    stored = kenotron.load_state_dict(tmp_path / "last")["mean_loss"].item()
    assert stored != 1.0 and stored in means
    saved = checkpoints.load_state(checkpoints.read_manifest(tmp_path / "last"))["lightning"]
    assert saved["history"] == [1.0] * len(saved["history"]) and len(saved["history"]) >= 11
    (state,) = saved["callbacks"].values()
    assert state == {"count": len(saved["history"])}


class Shadow(L.Callback):
    """Copies of the weights, as callbacks for moving averages keep them."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.shadow = {name: param.detach().clone() for name, param in pl_module.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}


def save_shadow(strategy: Any, path: str) -> str:
    trainer = make_trainer(strategy, [Shadow()], max_steps=1)
    train, _ = loaders(trainer, Task(Classifier, strategy))
    trainer.fit(Classifier(), train)
    try:
        trainer.save_checkpoint(path)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_copies_of_split_weights_are_refused_at_the_save(pool: RankPool, strategy: Any, tmp_path: Path) -> None:
    for error in pool.run(save_shadow, 2, strategy, str(tmp_path / "last")):
        assert "the state of Shadow holds tensors with the shapes of weights" in error


def find_rate(strategy: Any, folder: str) -> int:
    L.seed_everything(1, verbose=False)
    module = Classifier()
    module.lr = 0.02  # type: ignore[assignment]
    trainer = make_trainer(strategy, max_epochs=1, default_root_dir=folder)
    train, _ = loaders(trainer, Task(Classifier, strategy, rows=64))
    Tuner(trainer).lr_find(module, train, num_training=4, update_attr=False)
    return sum(len(optimizer.state) for optimizer in trainer.optimizers)


@pytest.mark.parametrize("strategy", [{}, {"zero_stage": 3}], ids=["zero1", "zero3"])
def test_a_search_for_the_learning_rate_leaves_no_moments(pool: RankPool, strategy: Any, tmp_path: Path) -> None:
    assert pool.run(find_rate, 2, strategy, str(tmp_path)) == [0, 0]
