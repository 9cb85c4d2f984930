"""Ranks that share samples load the same ones, or are told."""

from __future__ import annotations

import os
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from strategy_helpers import FEATURES, Classifier, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kenotron
from kenotron.testing import RankPool


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are drawn when they are asked for."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(FEATURES), torch.tensor(index % 3)


def train(seed: int | None, shift_by_rank: bool) -> tuple[list[float], str]:
    """Train with shuffling loader workers on this rank; returns its losses, or the error."""
    if seed is not None:
        L.seed_everything(seed, workers=True, verbose=False)
    if shift_by_rank:
        torch.manual_seed(int(os.environ["RANK"]))
    rows = [Noise()[i] for i in range(16)] if shift_by_rank else Noise()
    losses: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=kenotron.KenotronStrategy(pp=2),
        max_epochs=2,
        callbacks=[Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Classifier(), DataLoader(rows, batch_size=4, shuffle=True, num_workers=0 if shift_by_rank else 1))
    except ValueError as error:
        return [], str(error)
    finally:
        os.environ.pop("PL_SEED_WORKERS", None)
        os.environ.pop("PL_GLOBAL_SEED", None)
    return losses, ""


def test_workers_of_ranks_that_share_samples_draw_the_same_numbers(pool: RankPool) -> None:
    (first, error), (second, _) = pool.run(train, 2, 3, False)
    assert not error
    assert len(first) == 8
    assert first == second


def test_shuffling_agrees_where_the_user_set_no_seed(pool: RankPool) -> None:
    (first, error), (second, _) = pool.run(train, 2, None, False)
    assert not error
    assert first == second


class Late(Dataset[tuple[Tensor, Tensor]]):
    """Rows that are the same on all ranks but for one, and that only in one stage."""

    def __init__(self, row: int | None) -> None:
        self.row = row

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.arange(float(FEATURES)) + random.random() + np.random.rand()
        return x + (int(os.environ["RANK"]) if index == self.row else 0), torch.tensor(index % 3)


class Stages(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def run_stage(stage: str, row: int | None, strategy: dict[str, int]) -> str:
    random.seed(int(os.environ["RANK"]))  # the strategy lets them agree
    np.random.seed(int(os.environ["RANK"]))
    trainer = make_trainer(strategy, max_epochs=1)
    try:
        getattr(trainer, stage)(Stages(), DataLoader(Late(row), batch_size=4))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("strategy", [{"pp": 2}, {"tp": 2}], ids=["pp2", "tp2"])
def test_every_loader_is_compared_in_every_stage(pool: RankPool, stage: str, strategy: dict[str, int]) -> None:
    assert pool.run(run_stage, 2, stage, None, strategy) == ["", ""]
    for error in pool.run(run_stage, 2, stage, 19, strategy):
        assert "loaded different batches (number 4 of the loader)" in error


def test_different_batches_on_ranks_that_share_samples_are_refused(pool: RankPool) -> None:
    for _, error in pool.run(train, 2, 3, True):
        assert "loaded different batches" in error
