"""What a pipeline splits is known, or asked for: several loaders, small last batches, samples in other dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from strategy_helpers import PP2, Classifier, Keep, Rows, Task, close, fit, fit_like_one_process, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kenotron.testing import RankPool


class Both(Classifier):
    """A loss over the rows of two loaders together."""

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            batch = [torch.cat([batch["a"][i], batch["b"][i]]) for i in range(2)]
        return super().loss(batch)


def fit_both(strategy: Any) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    module, keep = Both(), Keep()
    trainer = make_trainer(strategy, [keep])
    trainer.fit(module, {"a": DataLoader(Rows(20), 8), "b": DataLoader(Rows(10, seed=5), 4)})
    return {str(i): loss for i, loss in enumerate(keep.losses)}


def test_batches_of_two_loaders_are_split_each_by_its_own_size(pool: RankPool) -> None:
    expected = pool.run(fit_both, 1, None)[0]
    assert len(expected) == 6
    for found in pool.run(fit_both, 2, {"pp": 2}):
        close(found, expected)


@pytest.mark.parametrize("rows", [17, 18])
def test_a_last_batch_smaller_than_the_number_of_stages_trains(pool: RankPool, rows: int, tmp_path: Path) -> None:
    fit_like_one_process(pool, Classifier, (4, {"pp": 4}), tmp_path, rows=rows)


def time_first(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x.unsqueeze(0).repeat(12, 1, 1), y


def time_last(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return y, x.unsqueeze(0).repeat(12, 1, 1)


def twice(samples: list[Any]) -> Any:
    return default_collate([*samples, *samples])


class Doubled(Classifier):
    def num_samples(self, batch: Any) -> int:
        return len(batch[0])


def refused(task: Task) -> str:
    try:
        fit(task)
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("collate", [time_first, time_last, twice])
def test_a_batch_whose_samples_are_not_in_the_first_dimension_is_refused(pool: RankPool, collate: Any) -> None:
    for text in pool.run(refused, 2, Task(Classifier, {"pp": 2}, collate=collate, val_rows=0)):
        assert "batch_first=True" in text and "num_samples(self, batch)" in text


def test_the_module_may_say_how_many_samples_there_are(pool: RankPool, tmp_path: Path) -> None:
    fit_like_one_process(pool, Doubled, PP2, tmp_path, collate=twice, val_rows=0)
